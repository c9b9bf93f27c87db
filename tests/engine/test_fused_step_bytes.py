"""What an optimizer step moves through memory, DeepSpeed's own and the fused one, on the same real engines."""

from __future__ import annotations

import pytest

from tests.engine.bytes_moved import TensorTraffic
from tests.engine.flavours import ALL
from tests.engine.problem import Phase
from tests.engine.ranks_train import ALL_BLOCKS, build_staged, micro_step
from tests.ranks import RankPools

FUSED_LIMIT = 34.0  # bytes per active element with bf16 gradients; 2 x 2 + 26 are the kernels' own
MASKED = (0, 1, 2)


def step_traffic(flavour: str, kernel: str, mask: bool) -> tuple[float, int]:
    """Bytes per active element of one ``optimizer.step``, on this rank, and how many are active."""
    engine, stages = build_staged(
        ALL[flavour],
        (Phase(9, ALL_BLOCKS),),
        "ordinary",
        "wide",
        {"kernel": kernel},
        gradient_accumulation_steps=1,
        optimizer={"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True}},
    )
    stages.advance(0)
    for step in range(2):
        micro_step(engine, "wide", step, 0)
        engine.step()
    if mask:
        stages.freeze([name for block in MASKED for name in stages.blocks.blocks[block]])
    micro_step(engine, "wide", 2, 0)
    traffic = TensorTraffic()
    own = 0
    active = sum(master.numel() for master in stages._adapter.master_tensors())
    if stages.masked_step is not None:
        step = stages.masked_step
        step._ops = step._ops._replace(
            masked_norm_=traffic.unseen(step._ops.masked_norm_),
            finalize_=traffic.unseen(step._ops.finalize_),
            masked_adamw_=traffic.unseen(step._ops.masked_adamw_),
        )
        active = step.work.active_numel
    with traffic:
        engine.optimizer.step()
    if stages.masked_step is not None:
        own = stages.masked_step.work.bytes_moved
    return (traffic.total + own) / active, active


@pytest.mark.parametrize(
    ("name", "least"), [pytest.param("zero1-bf16", 70, marks=pytest.mark.slow), ("zero2-bf16", 70), ("zero3-bf16", 70)]
)
def test_the_fused_step_moves_less_than_half_of_what_deepspeeds_own_does(
    ranks: RankPools, name: str, least: float
) -> None:
    for per_element, _ in ranks(2).run(step_traffic, flavour=name, kernel="deepspeed", mask=False):
        assert per_element >= least
    for per_element, _ in ranks(2).run(step_traffic, flavour=name, kernel="reference", mask=False):
        assert 30 <= per_element <= FUSED_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2-bf16", "zero3-bf16"])
def test_what_is_masked_costs_no_traffic(ranks: RankPools, name: str) -> None:
    whole = ranks(2).run(step_traffic, flavour=name, kernel="reference", mask=False)
    masked = ranks(2).run(step_traffic, flavour=name, kernel="reference", mask=True)
    assert sum(active for _, active in masked) < 0.7 * sum(active for _, active in whole)
    for per_element, _ in masked:
        assert per_element <= FUSED_LIMIT
