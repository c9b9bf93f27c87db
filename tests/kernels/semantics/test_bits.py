"""Every exact implementation gives the reference's bits, every time, in every variant and however it is launched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from progtuning_kernels import Hyper, Launch, Segment
from progtuning_kernels.rounding import join

from tests.kernels.semantics.problem import (
    BLOCK_SIZES,
    LAYOUT,
    SIZES,
    SMALL,
    Case,
    make_case,
    random_gradients,
    random_weights,
)

VARIANTS = (
    {"precision": "master", "weight": torch.bfloat16},
    {"precision": "master", "weight": torch.float16},
    {"precision": "master", "weight": None},
    {"precision": "remainder"},
    {"precision": "stochastic"},
)
VARIANT_IDS = ("bf16", "fp16", "fp32", "remainder", "stochastic")


def train(case: Case, steps: int = 3, sizes=SIZES) -> Case:
    for number in range(steps):
        case.step.step(case.gradients(random_gradients(sizes, number)))
    return case


def same_bits(one: Case, other: Case) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.contents(), other.contents(), strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_are_the_references(exact, variant, dtype):
    case = train(make_case(exact.impl, exact.device, dtype=dtype, **variant))
    expected = train(make_case("reference", "cpu", dtype=dtype, **variant))
    assert same_bits(case, expected)
    assert case.arena.untouched()


@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANT_IDS)
def test_the_same_step_twice_gives_the_same_bits(exact, variant):
    cases = [train(make_case(exact.impl, exact.device, **variant), steps=2) for _ in range(2)]
    assert same_bits(*cases)
    assert cases[0].step.control.sum_of_squares.item() == cases[1].step.control.sum_of_squares.item()


@pytest.mark.parametrize(
    "launch",
    [
        replace(SMALL, persistent_programs=3),
        Launch(tile=512, block=256, norm_programs=2),
        Launch(norm_programs=1),
    ],
    ids=["persistent", "small-tiles", "default-tiles"],
)
def test_bits_do_not_depend_on_how_it_is_launched(exact, launch):
    assert same_bits(
        train(make_case(exact.impl, exact.device, launch=launch, max_norm=0.0)),
        train(make_case(exact.impl, exact.device, max_norm=0.0)),
    )


@pytest.mark.parametrize("odd", [0, 1, 2, 4])
def test_bits_do_not_depend_on_where_buffers_and_gradients_lie(exact, odd):
    moved = train(make_case(exact.impl, exact.device, odd=odd, form="segments", max_norm=0.0))
    assert same_bits(moved, train(make_case(exact.impl, exact.device, max_norm=0.0)))
    assert moved.arena.untouched()


def test_many_groups_of_one_element_each(exact):
    segments = tuple(Segment(3 * index, 1, index) for index in range(21))
    groups = [
        Hyper(lr=1e-3 * (1 + index), betas=(0.5 + index / 80, 0.9), weight_decay=index / 21) for index in range(21)
    ]
    arguments = {"layout": [segments], "sizes": [63], "groups": groups}
    case = train(make_case(exact.impl, exact.device, **arguments), sizes=[63])
    assert same_bits(case, train(make_case("reference", "cpu", **arguments), sizes=[63]))
    assert case.step.control.steps.tolist() == [3] * 21


def test_weights_with_remainder_train_like_fp32_masters_bit_for_bit(exact):
    short = train(make_case(exact.impl, exact.device, precision="remainder"), steps=5)
    full = train(make_case(exact.impl, exact.device), steps=5)
    for buffer, expected in zip(short.buffers, full.buffers, strict=True):
        assert torch.equal(join(buffer.weight, buffer.remainder), expected.master)
        assert torch.equal(buffer.exp_avg, expected.exp_avg)
        assert torch.equal(buffer.exp_avg_sq, expected.exp_avg_sq)
        ties = (expected.master.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(buffer.weight[~ties], expected.master.bfloat16()[~ties])


def test_stochastic_rounding_keeps_the_mean_and_lands_on_a_neighbour(exact):
    size = 4096
    arguments = {"layout": [(Segment(0, size, 0),)], "sizes": [size], "groups": [Hyper(lr=1e-3, weight_decay=0.0)]}
    case = make_case(exact.impl, exact.device, precision="stochastic", max_norm=0.0, **arguments)
    case.buffers[0].weight.fill_(1.0)
    case.step.step(case.gradients([torch.ones(size)]))  # the first step of Adam moves by lr: to 0.999
    weights = case.buffers[0].weight.float()
    below, above = 0.99609375, 1.0
    assert set(weights.unique().tolist()) == {below, above}
    deviation = (above - below) * (0.256 * 0.744 / size) ** 0.5
    assert abs(weights.mean().item() - 0.999) < 4 * deviation


def test_stochastic_noise_differs_between_steps_and_seeds_and_not_between_runs(exact):
    def after(steps: int, seed: int) -> torch.Tensor:
        case = make_case(exact.impl, exact.device, precision="stochastic", max_norm=0.0, seed=seed)
        case.step.control.updates.fill_(steps)
        case.step.step(case.gradients([torch.full((size,), 0.5) for size in SIZES]))
        return case.buffers[0].weight.clone()

    assert torch.equal(after(0, seed=1), after(0, seed=1))
    assert not torch.equal(after(0, seed=1), after(0, seed=2))
    assert not torch.equal(after(0, seed=1), after(1, seed=1))


def test_special_values_round_as_pytorch_rounds_them(exact):
    """Ties, the largest finite numbers, infinities, subnormals and NaN in the master."""
    patterns = [0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x7F7FFFFF, 0x7F7F8000, 0xFF7FFFFF, 0x7F800000]
    patterns += [
        0xFF800000,
        0x7FC00000,
        0x7FFFFFFF,
        0xFFFFFFFF,
        0x7F800001,
        0x00000001,
        0x80008000,
        0x00018000,
        0,
        1 << 31,
    ]
    bits = torch.tensor([p - (1 << 32) if p >> 31 else p for p in patterns], dtype=torch.int64).to(torch.int32)
    size = len(patterns)
    arguments = {"layout": [(Segment(0, size, 0),)], "sizes": [size], "groups": [Hyper(lr=0.0, weight_decay=0.0)]}
    for weight in (torch.bfloat16, torch.float16):
        case = make_case(exact.impl, exact.device, weight=weight, **arguments)
        case.buffers[0].master.copy_(bits.view(torch.float32))
        case.step.step(case.gradients([torch.zeros(size)]))
        expected = case.buffers[0].master.to(weight)
        assert torch.equal(case.buffers[0].weight.isnan(), expected.isnan())
        there = ~expected.isnan()
        assert torch.equal(case.buffers[0].weight[there], expected[there])


@pytest.mark.parametrize("precision", ["master", "remainder", "stochastic"])
def test_eight_bit_state_follows_the_reference(exact, precision):
    case = train(make_case(exact.impl, exact.device, eight_bit=True, precision=precision), sizes=BLOCK_SIZES)
    expected = train(make_case("reference", "cpu", eight_bit=True, precision=precision), sizes=BLOCK_SIZES)
    for buffer, other in zip(case.buffers, expected.buffers, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            ours, theirs = getattr(buffer, name).cpu().int(), getattr(other, name).cpu().int()
            assert (ours != theirs).float().mean() < 1e-3  # values in the middle between two codes, within rounding
            assert (ours - theirs).abs().max() <= 1
        for name in ("absmax", "absmax_sq"):
            torch.testing.assert_close(getattr(buffer, name).cpu(), getattr(other, name).cpu(), rtol=1e-6, atol=0)
    assert case.arena.untouched()


def test_frozen_blocks_of_eight_bit_state_keep_every_bit(exact):
    case = make_case(exact.impl, exact.device, eight_bit=True)
    before = case.contents()
    case.step.set_active([[False, True, False, False], [False, True]])
    case.step.step(case.gradients(random_gradients(BLOCK_SIZES, 0)))
    count = len(before) // 2
    for index, (old, new) in enumerate(zip(before, case.contents(), strict=True)):
        first, stop = ((256, 1956), (1536, 1539))[index // count]
        if len(old) < 100:  # scales
            first, stop = first // 256, -(-stop // 256)
        assert torch.equal(old[:first], new[:first])
        assert torch.equal(old[stop:], new[stop:])
        assert not torch.equal(old[first:stop], new[first:stop])


def test_a_mask_change_moves_no_table(exact):
    """A captured graph holds their addresses."""
    case = make_case(exact.impl, exact.device, launch=replace(SMALL, persistent_programs=2))
    work = case.step.work
    tables = (work.piece_table, work.address_table, work.tile_table, work.tile_counts)
    places = [table.data_ptr() for table in tables]
    for active in ([[True] * 7, [True] * 3], [[False] * 7, [True, False, False]], [[True] * 7, [False] * 3]):
        case.step.set_active(active)
        case.step.step(case.gradients(random_gradients(SIZES, 0)))
    assert [table.data_ptr() for table in tables] == places
    assert tables[0] is work.piece_table


def test_learned_weights_differ_from_random_ones(exact):
    """The comparisons above would pass on buffers that nobody updates."""
    case = train(make_case(exact.impl, exact.device, max_norm=0.0))
    change = (case.masters()[0].cpu() - random_weights(SIZES[0], 0)).abs()
    for segment in LAYOUT[0]:
        moved = change[segment.start : segment.stop]
        assert moved.max() > 1e-4 if segment.active else not moved.any()
