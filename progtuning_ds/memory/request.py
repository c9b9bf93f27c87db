"""What is asked of the search: GPUs, a budget for each, rows and their length. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from progtuning_ds.errors import ConfigError, require_choice
from progtuning_ds.memory.activations import DEVICES
from progtuning_ds.memory.architecture import ATTENTIONS
from progtuning_ds.memory.costs import CostModel
from progtuning_ds.memory.setup import KERNELS, PRECISIONS

MAX_GPUS = 1024


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes a rank may use.

    Attributes:
        device: on the device.
        host: in host memory; None does not limit it.
        reserve: of the device, kept for what is no tensor: CUDA context, NCCL, cuBLAS workspaces, fragmentation.
    """

    device: int
    host: int | None = None
    reserve: int = 0

    def __post_init__(self) -> None:
        if self.reserve >= self.device:
            raise ConfigError(f"memory must be above the {self.reserve} bytes held in reserve, got {self.device}")

    @property
    def usable(self) -> int:
        """Bytes left for tensors."""
        return self.device - self.reserve


@dataclass(frozen=True, slots=True)
class Request:
    """What shall run on what."""

    gpus: int
    budget: Budget
    seq_len: int
    global_batch: int
    precision: str = "bf16"
    attention: str = "sdpa"
    device: str = "cuda"
    kernels: tuple[str, ...] = ("deepspeed",)
    frozen_bits: int = 16
    on_freeze: str = "keep"
    costs: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        for name in ("gpus", "seq_len", "global_batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
        if self.gpus > MAX_GPUS:
            raise ConfigError(f"gpus must be within 1..{MAX_GPUS}, got {self.gpus}")
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("attention", self.attention, ATTENTIONS)
        require_choice("device", self.device, DEVICES)
        for kernel in self.kernels:
            require_choice("kernel", kernel, KERNELS)
        if self.global_batch % self.gpus:
            below = self.global_batch // self.gpus * self.gpus
            near = f"{below} or {below + self.gpus}" if below else f"{self.gpus}"
            raise ConfigError(
                f"global_batch must be a multiple of the {self.gpus} GPUs, got {self.global_batch}; nearest: {near}"
            )

    @property
    def rows_per_rank(self) -> int:
        """Rows of an optimizer step on one rank."""
        return self.global_batch // self.gpus
