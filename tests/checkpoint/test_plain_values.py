"""Every value a scheduler or an optimizer group may hold survives JSON."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from progtuning_ds.checkpoint.plain_values import decode, encode


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0.1 + 0.2,
        5e-324,
        (0.9, 0.999),
        {"betas": (0.9, 0.95), "lr": 1e-4, "name": "always.decay", "none": None},
        {0: {"lr": 0.1}, 1: {"lr": 0.2}},
        {"__tuple__": "a key that looks like ours"},
        [[(0, "min_lrs", 1), 0.5]],
        Counter({3: 2, 5: 1}),
        -math.inf,
    ],
)
def test_plain_values_come_back_equal_and_of_the_same_type(value: object) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_not_a_number_comes_back() -> None:
    assert math.isnan(decode(json.loads(json.dumps(encode({"norm": math.nan}))))["norm"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_tensors_of_one_element_come_back_with_their_type(dtype: torch.dtype) -> None:
    back = decode(json.loads(json.dumps(encode(torch.tensor(3, dtype=dtype)))))
    assert back.dtype == dtype
    assert back.item() == 3


def test_numbers_of_numpy_become_pythons() -> None:
    assert encode(np.float64(0.5)) == 0.5


def test_what_is_not_plain_is_named() -> None:
    with pytest.raises(TypeError, match=r"state.layers\[1\] cannot be saved: function is no plain value"):
        encode({"layers": [1, test_not_a_number_comes_back]})
