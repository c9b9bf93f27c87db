"""What the kernels load and store, counted by the interpreter, is what they are documented to move."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from progtuning_kernels import Hyper, Launch, Segment

from tests.kernels.semantics.conftest import INTERPRETED
from tests.kernels.semantics.problem import make_case

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts what Triton's interpreter loads and stores")

SIZE = 12 * 1024
LAUNCH = Launch(tile=4096, block=1024, norm_programs=1)


@dataclass
class Traffic:
    loaded: int = 0
    stored: int = 0


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    from triton.runtime.interpreter import InterpreterBuilder

    counted = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, pointers, mask, *rest):
        counted.loaded += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        counted.stored += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    return counted


@pytest.mark.parametrize(
    ("variant", "dtype", "per_element"),
    [
        ({}, torch.bfloat16, 30),
        ({}, torch.float32, 34),
        ({"weight": None}, torch.float32, 32),
        ({"precision": "remainder"}, torch.bfloat16, 28),
        ({"precision": "stochastic"}, torch.bfloat16, 24),
        ({"eight_bit": True}, torch.bfloat16, 18.0625),
    ],
    ids=["bf16", "fp32-gradient", "fp32", "remainder", "stochastic", "8-bit"],
)
def test_a_step_moves_the_documented_bytes_and_tables(traffic, variant, dtype, per_element):
    segments = [(Segment(0, SIZE, 0),)]
    case = make_case(
        "triton", "cpu", dtype=dtype, layout=segments, sizes=[SIZE], launch=LAUNCH, groups=[Hyper()], **variant
    )
    case.step.step(case.gradients([torch.ones(SIZE)]))
    assert case.step.work.bytes_moved == pytest.approx(per_element * SIZE)
    tables = 8 * SIZE if variant.get("eight_bit") else 0  # the two maps, which stay in cache
    extra = traffic.loaded + traffic.stored - tables - case.step.work.bytes_moved
    assert 0 <= extra < 200 * case.step.work.num_tiles + 500  # work list, hyperparameters, the decision


def test_what_is_frozen_costs_nothing(traffic):
    segments = [(Segment(0, SIZE // 3, 0), Segment(SIZE // 3, SIZE - SIZE // 3, 1))]
    case = make_case("triton", "cpu", layout=segments, sizes=[SIZE], launch=LAUNCH)
    gradients = case.gradients([torch.ones(SIZE)])
    moved = []
    for mask in ([[True, True]], [[True, False]]):
        case.step.set_active(mask)
        before = traffic.loaded + traffic.stored
        case.step.step(gradients)
        moved.append(traffic.loaded + traffic.stored - before)
    assert moved[1] == pytest.approx(moved[0] / 3, rel=0.02)
