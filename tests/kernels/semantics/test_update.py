"""The update is AdamW's, on what is active and on nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.semantics.problem import (
    GROUPS,
    LAYOUT,
    SIZES,
    Oracle,
    active_flags,
    make_case,
    poison_frozen,
    random_gradients,
)

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "weight", "form", "odd"),
    [
        (torch.bfloat16, torch.bfloat16, "flat", 0),
        (torch.bfloat16, torch.bfloat16, "segments", 1),
        (torch.float16, torch.float16, "segments", 0),
        (torch.float32, torch.bfloat16, "flat", 3),
        (torch.float32, None, "segments", 0),
    ],
)
def test_agrees_with_adamw_in_float64_through_a_freeze(target, dtype, weight, form, odd):
    case = make_case(target.impl, target.device, dtype=dtype, weight=weight, form=form, odd=odd)
    oracle = Oracle(case)
    before = [master.cpu().clone() for master in case.masters()]
    active = active_flags()
    loss_scale = 8.0 if dtype == torch.float16 else 1.0
    for number in range(5):
        if number == 2:  # the low end freezes, as in Progtuning, and so does one segment of a group that goes on
            active = [[False, False, True, False, False, True, True], [False, True, False]]
            case.step.set_active(active)
        gradients = [g.to(dtype).float() for g in random_gradients(SIZES, number, scale=0.1)]
        oracle.run([g / loss_scale for g in gradients], active)
        poisoned = poison_frozen(gradients, LAYOUT, active)
        case.step.step(case.gradients(poisoned, active), loss_scale=loss_scale)
        assert case.step.control.norm.item() == pytest.approx(oracle.norm, rel=1e-12)
        assert not case.step.control.skip.item()
    for buffer, params, old in zip(case.buffers, oracle.params, before, strict=True):
        expected = old.double()
        for segment, param in zip(buffer.segments, params, strict=True):
            expected[segment.start : segment.stop] = param
        torch.testing.assert_close(buffer.master.cpu().double(), expected, rtol=2e-6, atol=2e-6)
        assert not torch.equal(buffer.master.cpu(), old)
        if weight is not None:
            assert torch.equal(buffer.weight, written(buffer, old, weight))
    assert case.arena.untouched()


def written(buffer, old, weight):
    """What the 16-bit weights must be: roundings of masters, and of the first masters where nothing ever trained."""
    return torch.where((buffer.master.cpu() == old), old, buffer.master.cpu()).to(weight).to(buffer.weight.device)


def test_what_never_trains_keeps_every_bit(target):
    case = make_case(target.impl, target.device)
    for buffer in case.buffers:  # not a rounding of the master: writing it anew would show
        buffer.weight.fill_(3)
    before = case.contents()
    active = active_flags()
    for number in range(3):
        gradients = poison_frozen(random_gradients(SIZES, number), LAYOUT, active)
        case.step.step(case.gradients(gradients))
    trained = [torch.zeros(size, dtype=torch.bool) for size in SIZES]
    for mask, segments in zip(trained, LAYOUT, strict=True):
        for segment in segments:
            mask[segment.start : segment.stop] = segment.active
    after = case.contents()
    masks = [mask.to(target.device) for mask in trained for _ in range(len(after) // len(trained))]
    for old, new, mask in zip(before, after, masks, strict=True):
        assert torch.equal(old[~mask], new[~mask])
        assert (old[mask] != new[mask]).float().mean() > 0.9


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (0, 3100), (1, 1840)])
def test_a_bad_gradient_leaves_every_byte_as_it_was(target, bad, place):
    case = make_case(target.impl, target.device)
    case.step.step(case.gradients(random_gradients(SIZES, 0)))
    before, steps = case.contents(), case.step.control.steps.tolist()
    gradients = random_gradients(SIZES, 1)
    gradients[place[0]][place[1]] = bad
    case.step.step(case.gradients(gradients))
    assert case.step.control.skip.item() == 1
    assert case.step.control.skipped.item() == 1
    assert case.step.control.steps.tolist() == steps
    assert all(torch.equal(old, new) for old, new in zip(before, case.contents(), strict=True))
    assert case.arena.untouched()


def test_a_skipped_step_is_as_if_it_had_not_been(target):
    skipping, plain = make_case(target.impl, target.device), make_case(target.impl, target.device)
    for number in range(3):
        gradients = random_gradients(SIZES, number)
        plain.step.step(plain.gradients(gradients))
        if number == 1:
            skipping.step.step(skipping.gradients([g * float("inf") for g in gradients]))
        skipping.step.step(skipping.gradients(gradients))
    assert all(torch.equal(a, b) for a, b in zip(skipping.contents(), plain.contents(), strict=True))


def test_only_groups_that_train_count_steps(target):
    case = make_case(target.impl, target.device)
    case.step.step(case.gradients(random_gradients(SIZES, 0)))
    assert case.step.control.steps.tolist() == [1, 1, 1]
    active = [[segment.group != 1 for segment in segments] for segments in LAYOUT]
    case.step.set_active(active)
    case.step.step(case.gradients(random_gradients(SIZES, 1)))
    assert case.step.control.steps.tolist() == [2, 1, 2]
    case.step.set_active(active, groups=[True, True, False])  # another rank holds the active part of group 1
    case.step.step(case.gradients(random_gradients(SIZES, 2)))
    assert case.step.control.steps.tolist() == [3, 2, 2]


def test_gradients_are_read_only(target):
    case = make_case(target.impl, target.device)
    gradients = case.gradients(random_gradients(SIZES, 0))
    before = [g.clone() for g in gradients]
    case.step.step(gradients)
    assert all(torch.equal(old, new) for old, new in zip(before, gradients, strict=True))


def test_nothing_active_is_a_step_of_norm_zero(target):
    case = make_case(target.impl, target.device)
    before = case.contents()
    case.step.set_active([[False] * len(segments) for segments in LAYOUT])
    case.step.step(case.gradients([g * float("nan") for g in random_gradients(SIZES, 0)]))
    assert case.step.control.norm.item() == 0
    assert case.step.control.steps.tolist() == [0, 0, 0]
    assert all(torch.equal(old, new) for old, new in zip(before, case.contents(), strict=True))


def test_the_sum_of_squares_may_be_summed_over_ranks(target):
    case = make_case(target.impl, target.device, max_norm=0.5)
    gradients = random_gradients(SIZES, 0)
    case.step.step(case.gradients(gradients), reduce=lambda total: total.mul_(4))
    halved = make_case(target.impl, target.device, max_norm=0.25)
    halved.step.step(halved.gradients(gradients))
    assert case.step.control.norm.item() == 2 * halved.step.control.norm.item()
    assert case.step.control.grad_scale.item() == pytest.approx(halved.step.control.grad_scale.item(), rel=1e-6)


def test_finite_gradients_whose_squares_overflow_fp32_do_not_skip(target):
    case = make_case(target.impl, target.device)
    gradients = random_gradients(SIZES, 0, scale=1e30)
    case.step.step(case.gradients(gradients))
    assert not case.step.control.skip.item()
    squares = [
        g[s.start : s.stop].bfloat16().double().square().sum()
        for g, segments in zip(gradients, LAYOUT, strict=True)
        for s in segments
        if s.active
    ]
    assert case.step.control.norm.item() == pytest.approx(sum(squares).sqrt().item(), rel=1e-12)


def test_hyperparameters_and_limits_change_between_steps(target):
    changing = make_case(target.impl, target.device, max_norm=0.0)
    gradients = random_gradients(SIZES, 0)
    before = changing.masters()[0].clone()
    changing.step.control.set_groups([type(g)(lr=0.0, betas=g.betas, eps=g.eps, weight_decay=0.5) for g in GROUPS])
    changing.step.step(changing.gradients(gradients))
    assert torch.equal(changing.masters()[0], before)
    changing.step.control.set_groups(GROUPS)
    changing.step.control.set_limits(max_norm=0.5, loss_scale=4.0)
    changing.step.step(changing.gradients(gradients))
    norm = changing.step.control.norm.item()
    assert changing.step.control.grad_scale.item() == pytest.approx(0.5 / (4 * norm), rel=1e-5)
    assert not torch.equal(changing.masters()[0], before)
