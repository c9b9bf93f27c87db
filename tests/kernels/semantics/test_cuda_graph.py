"""On a GPU: a step never waits for it, and a captured step outlives mask changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.semantics.conftest import INTERPRETED
from tests.kernels.semantics.problem import LAYOUT, SIZES, SMALL, make_case, random_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MASKS = ([[True] * 7, [True] * 3], [[False, False, True, False, False, True, True], [False, True, False]])


def test_a_step_does_not_wait_for_the_gpu():
    case = make_case("triton", "cuda")
    batches = [case.gradients(random_gradients(SIZES, number)) for number in range(3)]
    case.step.step(batches[0])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.step.set_active(MASKS[1])
        case.step.control.set_groups([replace(group, lr=1e-4) for group in case.step.control.groups])
        for gradients in batches[1:]:
            case.step.step(gradients, loss_scale=2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_follows_the_mask():
    launch = replace(SMALL, persistent_programs=8)
    captured, plain = (make_case("triton", "cuda", launch=launch) for _ in range(2))
    gradients = captured.gradients(random_gradients(SIZES, 0))
    for case in (captured, plain):
        case.step.step(gradients)
    captured.step.bind(gradients)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step.run()
    for number, mask in enumerate((MASKS[0], MASKS[1], [[s.active for s in segments] for segments in LAYOUT])):
        for old, new in zip(gradients, random_gradients(SIZES, number), strict=True):
            old.copy_(new)
        captured.step.set_active(mask)
        captured.step.bind(gradients)
        graph.replay()
        plain.step.set_active(mask)
        plain.step.step(gradients)
        assert all(torch.equal(a, b) for a, b in zip(captured.contents(), plain.contents(), strict=True))
        assert captured.step.control.steps.tolist() == plain.step.control.steps.tolist()
