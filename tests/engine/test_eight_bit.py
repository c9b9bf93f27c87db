"""Optimizers whose state is 8-bit blocks, through the stage engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine import problem
from tests.engine.flavours import ALL
from tests.engine.problem import shrinking
from tests.engine.ranks_train import build_staged, optimizer_step, weights
from tests.ranks import RankPools


def build(flavour: str, optimizer: str, groups: str, kind: str = "bert") -> tuple[Any, Any]:
    import bitsandbytes

    from progtuning_ds import MaskedAdamW

    # Registered for the JSON by the name under which DeepSpeed looks in torch.optim.
    torch.optim.EightBit = {  # type: ignore[attr-defined]
        "masked": lambda params, **options: MaskedAdamW(params, **options, state_bits=8),
        "bitsandbytes": lambda params, **options: bitsandbytes.optim.AdamW8bit(params, **options, min_8bit_size=256),
        "paged": lambda params, **options: bitsandbytes.optim.PagedAdamW8bit(params, **options, min_8bit_size=256),
    }[optimizer]
    adam = {"lr": problem.BASE_LR, "betas": problem.BETAS, "eps": problem.EPS, "weight_decay": 0.0}
    return build_staged(
        ALL[flavour],
        shrinking(),
        groups,
        kind,
        optimizer={"type": "EightBit", "params": adam},
        zero_allow_untested_optimizer=True,
        scheduled=False,
    )


def states(engine: Any) -> list[dict[str, torch.Tensor]]:
    return [
        {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}
        for state in engine.basic_optimizer.state.values()
    ]


def planned(flavour: str, optimizer: str) -> dict[str, Any]:
    engine, stages = build(flavour, optimizer, "plan")
    seen: dict[str, Any] = {"released": [], "carried": [], "losses": [], "uint8": False}
    frozen: dict[str, torch.Tensor] = {}
    step = 0
    for phase in shrinking():
        before = states(engine)
        transition = stages.advance(step)
        if transition is not None:
            after = states(engine)
            seen["released"].append(sum(transition.released_bytes.values()))
            known = {tuple(sorted((k, v.sum().item()) for k, v in state.items() if v.numel() > 1)) for state in before}
            seen["carried"].append(
                all(tuple(sorted((k, v.sum().item()) for k, v in s.items() if v.numel() > 1)) in known for s in after)
                and 0 < len(after) < len(before)
            )
            full = weights(engine)
            frozen |= {name: full[name] for name in transition.frozen}
        for _ in range(phase.steps):
            seen["losses"] += optimizer_step(engine, "bert", step)
            step += 1
    seen["uint8"] = any(value.dtype == torch.uint8 for state in states(engine) for value in state.values())
    final = weights(engine)
    seen["frozen"] = bool(frozen) and all(torch.equal(final[name], value) for name, value in frozen.items())
    return seen


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("zero2-fp32", "masked"),
        ("zero2-fp32", "bitsandbytes"),
        ("zero3-fp32", "masked"),
        ("zero3-fp32", "bitsandbytes"),
        pytest.param("zero1-fp32", "paged", marks=pytest.mark.slow),
        pytest.param("zero2-bf16", "paged", marks=pytest.mark.slow),
        pytest.param("zero3-bf16", "paged", marks=pytest.mark.slow),
    ],
)
def test_planned_boundaries_keep_the_blocks_of_survivors_and_release_the_others(
    ranks: RankPools, name: str, optimizer: str
) -> None:
    pytest.importorskip("bitsandbytes")
    for seen in ranks(2).run(planned, flavour=name, optimizer=optimizer):
        assert seen["uint8"]
        assert seen["frozen"]
        assert len(seen["released"]) == 2
        assert all(released > 0 for released in seen["released"])
        assert all(seen["carried"])
        assert all(loss == loss for loss in seen["losses"])


def decoded(stages: Any) -> dict[str, list[tuple[str, int, torch.Tensor, torch.Tensor]]]:
    """Moments of this rank: per kind ``(parameter, first element, values, largest of each value's block)``."""
    from bitsandbytes.functional import create_dynamic_map

    from progtuning_ds.zero.held_state import held_buffers

    maps = {True: create_dynamic_map(signed=True), False: create_dynamic_map(signed=False)}
    found: dict[str, list[Any]] = {"first": [], "second": []}
    for buffer in held_buffers(stages.adapter):
        state = stages.adapter.torch_optimizer.state[buffer.master]
        for kind, codes, scales in (
            ("first", state.get("state1", state.get("exp_avg")), state.get("absmax1", state.get("absmax"))),
            ("second", state.get("state2", state.get("exp_avg_sq")), state.get("absmax2", state.get("absmax_sq"))),
        ):
            if codes.dtype == torch.uint8:
                assert scales.numel() == -(-codes.numel() // 256)
                largest = scales.repeat_interleave(256)[: codes.numel()]
                values = maps[kind == "first"][codes.long().view(-1)] * largest
            else:
                values, largest = codes.view(-1).clone(), torch.zeros(codes.numel())
            for span in buffer.spans:
                cut = slice(span.offset, span.offset + span.numel)
                found[kind].append((span.param, span.start, values[cut].clone(), largest[cut].clone()))
    return found


def unplanned(flavour: str, optimizer: str) -> dict[str, Any]:
    """Leave two blocks of six in the middle, then train on, then let one of them come back."""
    engine, stages = build(flavour, optimizer, "ordinary")
    stages.advance(0)
    seen: dict[str, Any] = {"losses": optimizer_step(engine, "bert", 0), "before": decoded(stages)}
    every = stages.trainable_names
    keep = [name for name in every if ".layer.1." not in name and ".layer.4." not in name]
    transition = stages.retarget(keep)
    seen |= {"after": decoded(stages), "planned": transition.planned, "moved": transition.moved_bytes}
    seen["trains"] = keep
    frozen = weights(engine)
    seen["losses"] += optimizer_step(engine, "bert", 1)
    stages.retarget([name for name in every if ".layer.4." not in name])
    seen["losses"] += optimizer_step(engine, "bert", 2)
    final = weights(engine)
    seen["still"] = all(torch.equal(final[name], frozen[name]) for name in every if ".layer.4." in name)
    seen["moves"] = any(not torch.equal(final[name], frozen[name]) for name in every if ".layer.1." in name)
    return seen


def joined(ranks: list[dict[str, Any]], when: str, kind: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Whole parameters: values, and the largest of each one's block."""
    pieces: dict[str, list[Any]] = {}
    for rank in ranks:
        for name, start, values, largest in rank[when][kind]:
            pieces.setdefault(name, []).append((start, values, largest))
    whole = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        whole[name] = tuple(torch.cat([part[index] for part in parts]) for index in (1, 2))
    return whole


# Half the widest step of each map, which is the one next to 1.
HALF_STEP = {"first": 0.0071, "second": 0.0036}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("zero2-fp32", "masked"),
        ("zero3-fp32", "bitsandbytes"),
        pytest.param("zero2-fp32", "bitsandbytes", marks=pytest.mark.slow),
        pytest.param("zero1-fp32", "paged", marks=pytest.mark.slow),
        pytest.param("zero2-bf16", "paged", marks=pytest.mark.slow),
        pytest.param("bf16-optimizer", "bitsandbytes", marks=pytest.mark.slow),
        pytest.param("zero3-fp32", "masked", marks=pytest.mark.slow),
        pytest.param("zero3-bf16", "paged", marks=pytest.mark.slow),
        pytest.param("zero3-subgroups-fp32", "bitsandbytes", marks=pytest.mark.slow),
    ],
)
def test_an_unplanned_change_forms_blocks_anew_within_half_a_step(ranks: RankPools, name: str, optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    runs = ranks(2).run(unplanned, flavour=name, optimizer=optimizer)
    for kind, bound in HALF_STEP.items():
        before, after = joined(runs, "before", kind), joined(runs, "after", kind)
        assert sorted(after) == sorted(runs[0]["trains"])
        exact = total = 0
        for parameter, (values, largest) in after.items():
            old = before[parameter][0]
            assert values.shape == old.shape
            assert ((values - old).abs() <= bound * largest).all(), f"{kind} of {parameter}"
            exact += int((values == old).sum())
            total += values.numel()
        assert 0 < exact <= total
        assert any(values.any() for values, _ in after.values())
    for run in runs:
        assert not run["planned"]
        assert run["still"]
        assert run["moves"]
        assert all(loss == loss for loss in run["losses"])


def eight_bit_state(values: torch.Tensor) -> dict[str, Any]:
    """State as bitsandbytes makes it."""
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    state: dict[str, Any] = {"step": 3}
    for number, signed in ((1, True), (2, False)):
        table = create_dynamic_map(signed=signed)
        codes, about = quantize_blockwise(values if signed else values.square(), code=table, blocksize=256)
        state |= {f"state{number}": codes, f"qmap{number}": table, f"absmax{number}": about.absmax}
    return state


@pytest.mark.parametrize(
    "pieces",
    [
        [[(0, 1024)]],
        [[(256, 512), (1024, 476)]],
        [[(0, 300)], [(300, 700), (1100, 400)]],
        [[(17, 1)], [(100, 100), (1450, 50)], [(512, 256)]],
    ],
)
def test_a_block_of_one_scale_keeps_its_bits_and_others_are_encoded_anew(pieces: list[list[tuple[int, int]]]) -> None:
    pytest.importorskip("bitsandbytes")
    from progtuning_ds.transfer import split_buffer
    from progtuning_ds.zero.cut_state import cut_state

    generator = torch.Generator().manual_seed(0)
    master = torch.zeros(1500)
    state = eight_bit_state(torch.randn(1500, generator=generator) * torch.logspace(-6, 2, 1500))
    old = {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}
    sizes = [sum(numel for _, numel in piece) + 10 for piece in pieces]  # and some padding
    new = cut_state(master, state, lambda tensor: split_buffer(tensor, pieces, sizes), len(pieces))
    for piece, size, part in zip(pieces, sizes, new, strict=True):
        assert part["step"] == 3
        came_from = torch.cat([torch.arange(start, start + numel) for start, numel in piece])
        for number, bound in ((1, 0.0071), (2, 0.0036)):
            table, codes, scales = part[f"qmap{number}"], part[f"state{number}"], part[f"absmax{number}"]
            assert codes.shape == (size,)
            assert scales.shape == (-(-size // 256),)
            spread = scales.repeat_interleave(256)[:size]
            values = table[codes.long()] * spread
            old_codes, old_scales = old[f"state{number}"][came_from], old[f"absmax{number}"][came_from // 256]
            theirs = table[old_codes.long()] * old_scales
            used = len(came_from)
            assert ((values[:used] - theirs).abs() <= bound * spread[:used]).all()
            assert not values[used:].any(), "padding is zero"
            for block in range(-(-used // 256)):
                cells = slice(block * 256, min((block + 1) * 256, used))
                if len(old_scales[cells].unique()) == 1:
                    assert torch.equal(codes[cells], old_codes[cells])
                    assert scales[block] == old_scales[cells][0]


def test_a_map_that_is_not_known_is_refused_before_anything_moves() -> None:
    pytest.importorskip("bitsandbytes")
    from progtuning_ds.errors import UnsupportedStateError
    from progtuning_ds.zero.cut_state import check_state

    state = eight_bit_state(torch.randn(1500))
    check_state(torch.zeros(1500), state)
    state["qmap1"] = state["qmap1"] ** 3
    with pytest.raises(UnsupportedStateError, match="'state1' is in a quantization map this version does not know"):
        check_state(torch.zeros(1500), state)
    with pytest.raises(UnsupportedStateError, match="cannot be re-partitioned with a master of shape"):
        check_state(torch.zeros(1500), {"odd": torch.zeros(7)})
