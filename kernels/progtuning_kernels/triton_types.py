"""How PyTorch's types are called in Triton, and the options that all kernels are compiled with. Needs Triton."""

from __future__ import annotations

import torch
import triton.language as tl

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return what Triton calls fp32, fp16 or bf16."""
    return _DTYPES[dtype]


def compile_options() -> dict[str, bool]:
    """Options of every kernel: no fused multiply-add, so that results have the reference's bits.

    Said explicitly because Triton's default differs between versions and follows an environment variable.
    """
    return {"enable_fp_fusion": False}
