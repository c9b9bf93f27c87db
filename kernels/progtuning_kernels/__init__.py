"""Fused optimizer kernels for progressive fine-tuning: one AdamW step that clips and updates only what trains.

A package of its own so that the repository's `kernels/` folder is never importable under that name, which
belongs to the Hugging Face package `kernels`. It needs torch; Triton is imported only where it is chosen to run.

    step = MaskedStep([FlatBuffer(segments, exp_avg, exp_avg_sq, weight, master)], [Hyper(lr=2e-5)], max_norm=1.0)
    step.step([gradient])                      # norm, clip, AdamW, bf16 weights; frozen segments are not touched
    step.set_active([[False, True, True]])     # from the next step on
"""

from progtuning_kernels.buffers import STATE_BLOCK, FlatBuffer
from progtuning_kernels.control import Control, Hyper
from progtuning_kernels.dispatch import IMPLEMENTATIONS, choose
from progtuning_kernels.segments import Segment
from progtuning_kernels.step import MaskedStep
from progtuning_kernels.worklist import Gradients, Launch, WorkList

__all__ = [
    "IMPLEMENTATIONS",
    "STATE_BLOCK",
    "Control",
    "FlatBuffer",
    "Gradients",
    "Hyper",
    "Launch",
    "MaskedStep",
    "Segment",
    "WorkList",
    "choose",
]
