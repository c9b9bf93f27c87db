"""Compile a kernel for an NVIDIA architecture without a GPU and read what became of it. Needs Triton's own tools."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Binary:
    """One compiled kernel."""

    registers: int
    stack: int
    local: int
    shared: int
    sass: str
    ptx: str
    ttgir: str

    def count(self, pattern: str) -> int:
        """Instructions of the machine code that match a regular expression."""
        return len(re.findall(pattern, self.sass))


def compile_kernel(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], arch: int, warps: int = 4, **options: Any
) -> Binary:
    """Compile as the launcher would: pointers to whole tensors are 16-byte aligned, other arguments are anything."""
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, values, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False, **options}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    used = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    return Binary(
        registers=int(used["REG"]),
        stack=int(used["STACK"]),
        local=int(used["LOCAL"]),
        shared=int(used["SHARED"]),
        sass=sass,
        ptx=compiled.asm["ptx"],
        ttgir=compiled.asm["ttgir"],
    )
