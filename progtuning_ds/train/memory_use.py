"""What this process really holds: now, at its highest, and in host memory. Imports torch; no deepspeed.runtime.

On an accelerator the allocator answers; on the CPU the kernel does (resident set, and its high-water mark, which
Linux lets a process set back: proc(5), clear_refs).
"""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes.

    Attributes:
        device: held by tensors on the accelerator; the resident set on the CPU.
        peak: most of these since the last ``reset``.
        reserved: taken from the device by the allocator, fragmentation included; the same as ``peak`` on the CPU.
        host: the resident set of the process.
    """

    device: int
    peak: int
    reserved: int
    host: int

    @property
    def fragmentation(self) -> int:
        """Bytes the allocator took at its peak and no tensor used."""
        return max(0, self.reserved - self.peak)

    @classmethod
    def read(cls) -> MemoryUse:
        """Read now."""
        resident, highest = _resident()
        if torch.cuda.is_available():
            return cls(
                torch.cuda.memory_allocated(),
                torch.cuda.max_memory_allocated(),
                torch.cuda.max_memory_reserved(),
                resident,
            )
        return cls(resident, highest, highest, resident)


def reset_peak() -> None:
    """Start the peak anew, from a process that has given back what it can."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed blocks in lists of its own
    if trim is not None:
        trim(0)
    if _CLEAR.exists():
        _CLEAR.write_text(_RESET_PEAK)


def _resident() -> tuple[int, int]:
    """Resident set and its high-water mark; the present one for both where the system keeps no mark."""
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        if "VmRSS" in lines:
            return 1024 * int(lines["VmRSS"].split()[0]), 1024 * int(lines["VmHWM"].split()[0])
    import psutil

    held = psutil.Process().memory_info().rss
    return held, held
