"""8-bit state is bitsandbytes' own: it reads what we write, and we go on from what it wrote."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from progtuning_kernels import STATE_BLOCK, Hyper, Segment
from progtuning_kernels.quantization import decode, dynamic_map, encode

from tests.kernels.semantics.problem import BLOCK_SIZES, make_case, random_gradients, random_weights

SIZE = 1000
HYPER = Hyper(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05)


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_those_of_bitsandbytes(signed):
    assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_encoding_gives_the_nearest_code_and_nearly_always_that_of_bitsandbytes(signed):
    values = random_weights(4 * SIZE, 3) * torch.logspace(-8, 0, 4 * SIZE)
    values = values if signed else values.square()
    codes, scales = torch.empty(len(values), dtype=torch.uint8), torch.empty(-(-len(values) // STATE_BLOCK))
    encode(values, codes, scales, signed)
    table = dynamic_map(signed).double()
    distances = (table - (values / scales.repeat_interleave(STATE_BLOCK)[: len(values)]).double()[:, None]).abs()
    ours = distances.gather(1, codes.long()[:, None])[:, 0]
    torch.testing.assert_close(ours, distances.amin(dim=1), rtol=0, atol=1e-9)
    theirs, state = bnb.quantize_blockwise(values, code=dynamic_map(signed), blocksize=STATE_BLOCK)
    assert torch.equal(scales, state.absmax)
    assert close_codes(codes, theirs, signed)


def close_codes(ours: torch.Tensor, theirs: torch.Tensor, signed: bool) -> bool:
    """Whether few codes differ, by one, or by no more than bitsandbytes rounds on a CPU: to 2**-15 of the scale."""
    table = dynamic_map(signed)
    steps = (ours.int() - theirs.int()).abs()
    distance = (table[ours.long()] - table[theirs.long()]).abs()
    return bool(((steps <= 1) | (distance < 1e-4)).all() and (steps > 0).float().mean() < 0.1)


def test_bitsandbytes_reads_our_state(exact):
    case = make_case(exact.impl, exact.device, eight_bit=True)
    for number in range(2):
        case.step.step(case.gradients(random_gradients(BLOCK_SIZES, number)))
    for buffer in case.buffers:
        for segment in (s for s in buffer.segments if s.active):
            span = slice(segment.start, segment.stop)
            scales = slice(segment.start // STATE_BLOCK, -(-segment.stop // STATE_BLOCK))
            for codes, absmax, signed in (
                (buffer.exp_avg, buffer.absmax, True),
                (buffer.exp_avg_sq, buffer.absmax_sq, False),
            ):
                read = bnb.dequantize_blockwise(
                    codes[span].cpu(), absmax=absmax[scales].cpu(), code=dynamic_map(signed), blocksize=STATE_BLOCK
                )
                assert read.abs().max() > 0
                assert torch.equal(read, decode(codes[span], absmax[scales], signed).cpu())


def bitsandbytes_step(state: dict[str, torch.Tensor], gradient: torch.Tensor, step: int) -> None:
    """One step of `bitsandbytes.optim.AdamW8bit` with an fp32 weight, by its own operator on the CPU."""
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", gradient, state["master"], state["exp_avg"], state["exp_avg_sq"], *HYPER.betas, 0.0, 0.0,
        HYPER.eps, step, HYPER.lr, dynamic_map(True), dynamic_map(False), state["absmax"], state["absmax_sq"],
        HYPER.weight_decay, 1.0, False,
    )  # fmt: skip


def test_steps_of_either_continue_the_others(exact):
    arguments = {"layout": [(Segment(0, SIZE, 0),)], "sizes": [SIZE], "groups": [HYPER], "max_norm": 0.0}
    case = make_case(exact.impl, exact.device, eight_bit=True, dtype=torch.float32, **arguments)
    buffer = case.buffers[0]
    names = ("master", "exp_avg", "exp_avg_sq", "absmax", "absmax_sq")
    state = {name: getattr(buffer, name).cpu().clone() for name in names}
    for step, gradient in enumerate(random_gradients([SIZE] * 4, 0), start=1):
        if step % 2:  # their first and third step, from our state
            bitsandbytes_step(state, gradient, step)
            case.step.step(case.gradients([gradient]))
            compare(state, buffer)
            for name in names:  # then we go on from theirs
                getattr(buffer, name).copy_(state[name])
        else:
            case.step.step(case.gradients([gradient]))
            bitsandbytes_step(state, gradient, step)
            compare(state, buffer)
            state = {name: getattr(buffer, name).cpu().clone() for name in names}


def compare(state: dict[str, torch.Tensor], buffer) -> None:
    torch.testing.assert_close(buffer.master.cpu(), state["master"], rtol=1e-5, atol=1e-6)
    for name in ("absmax", "absmax_sq"):
        torch.testing.assert_close(getattr(buffer, name).cpu(), state[name], rtol=1e-5, atol=0)
    assert close_codes(buffer.exp_avg.cpu(), state["exp_avg"], signed=True)
    assert close_codes(buffer.exp_avg_sq.cpu(), state["exp_avg_sq"], signed=False)
