"""Sizes as people write them, and the engine that a DeepSpeed JSON describes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progtuning_ds.errors import ConfigError
from progtuning_ds.memory import EngineSetup, deepspeed_zero, format_bytes, parse_bytes, setup_from_deepspeed


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("80GiB", 80 * 2**30), ("1.5 gib", 3 * 2**29), ("512", 512), (77, 77), ("2G", 2**31)],
)
def test_sizes_are_read_as_written(text: object, size: int) -> None:
    assert parse_bytes("memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24 elephants", 0, -5, True, None, "0GB"])
def test_what_is_no_size_is_refused_with_the_field(text: object) -> None:
    with pytest.raises(ConfigError, match="memory must"):
        parse_bytes("memory", text)


@given(st.integers(1, 2**50))
def test_a_formatted_size_is_near_what_it_was(size: int) -> None:
    assert parse_bytes("memory", format_bytes(size)) == pytest.approx(size, rel=0.05)


@given(
    stage=st.integers(0, 3),
    offload=st.booleans(),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    bucket=st.integers(1, 10**9),
    live=st.integers(1, 10**9),
)
def test_an_engine_survives_its_deepspeed_json(
    stage: int, offload: bool, precision: str, bucket: int, live: int
) -> None:
    setup = EngineSetup(
        zero_stage=stage,
        world_size=4,
        precision=precision,
        offload_optimizer=offload and stage > 0,
        offload_param=offload and stage == 3,
        **({"reduce_bucket": bucket} if stage else {}),
        **({"prefetch_bucket": bucket, "max_live": live} if stage == 3 else {}),
        overlap_comm=stage in (1, 2),
    )
    content = {"zero_optimization": deepspeed_zero(setup), precision: {"enabled": True}}
    assert setup_from_deepspeed(content, 4) == setup
