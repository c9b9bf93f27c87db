"""Owns what decides where bytes lie beside the model itself: engine, kernels, batch. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from progtuning_ds.errors import ConfigError, require_choice
from progtuning_ds.memory.activations import DEVICES
from progtuning_ds.memory.architecture import ATTENTIONS
from progtuning_ds.memory.state import Flavour
from progtuning_ds.on_freeze import KINDS

PRECISIONS = ("bf16", "fp16", "fp32")
KERNELS = ("deepspeed", "fused")


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """How an engine holds a model; bucket sizes in elements, as in a DeepSpeed JSON.

    Attributes:
        zero_stage: 0 to 3.
        world_size: data-parallel ranks.
        precision: of weights and activations.
        offload_optimizer: masters, moments and their gradients live in host memory.
        offload_param: ZeRO-3 shards of the weights live in host memory.
        fp32_gradients: gradients accumulate in fp32.
        kernel: ``deepspeed`` copies each group's gradient to fp32 before the step; ``fused`` reads it as it is.
        state_bits: 32, or 8 for block-wise quantized moments (a scale in fp32 for every 256).
        frozen_bits: 16, or 8 or 4 for the linear layers of a base under adapters, as bitsandbytes holds them.
        double_quant: with 4 bits, the scales are quantized as well.
        reduce_bucket: gradients that travel together.
        overlap_comm: two such buckets.
        prefetch_bucket: ZeRO-3 weights gathered ahead of their use.
        persistence_threshold: ZeRO-3 keeps parameters up to this size whole on every rank.
        max_live: ZeRO-3 weights that stay gathered at most, and distance of reuse within which they do.
        sub_group: ZeRO-3 elements that are updated together.
        host_parts: groups that leave after one of these stages keep their moments in host memory between steps; the
            rest of their state stays on the device.
        on_freeze: ``keep``, or ``int8`` or ``nf4`` for linear layers of blocks that have frozen for good.
    """

    zero_stage: int
    world_size: int
    precision: str = "bf16"
    offload_optimizer: bool = False
    offload_param: bool = False
    fp32_gradients: bool = False
    kernel: str = "deepspeed"
    state_bits: int = 32
    frozen_bits: int = 16
    double_quant: bool = True
    reduce_bucket: int = 500_000_000
    overlap_comm: bool = False
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    host_parts: tuple[int, ...] = ()
    on_freeze: str = "keep"

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("kernel", self.kernel, KERNELS)
        require_choice("state_bits", str(self.state_bits), ("32", "8"))
        require_choice("on_freeze", self.on_freeze, KINDS)
        require_choice("frozen_bits", str(self.frozen_bits), ("16", "8", "4"))
        if self.offload_param and self.zero_stage != 3:
            raise ConfigError(f"offload_param is for zero_stage 3, got zero_stage {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError("offload_optimizer needs zero_stage 1, 2 or 3, got 0")
        _ = self.flavour  # which checks the rest

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def flavour(self) -> Flavour:
        """What decides the optimizer state."""
        return Flavour(
            zero_stage=self.zero_stage,
            world_size=self.world_size,
            bit16=self.precision != "fp32",
            offload_optimizer=self.offload_optimizer,
            fp32_gradients=self.fp32_gradients,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass and what repeats it.

    Attributes:
        micro_batch: rows per rank and forward pass.
        seq_len: tokens per row, padding included.
        accumulation: forward passes per optimizer step.
        checkpointing: blocks recompute their activations in backward.
        attention: ``eager``, ``sdpa`` or ``flash``.
        device: ``cuda`` or ``cpu``, which keep dropout masks differently.
    """

    micro_batch: int
    seq_len: int
    accumulation: int = 1
    checkpointing: bool = False
    attention: str = "sdpa"
    device: str = "cuda"

    def __post_init__(self) -> None:
        require_choice("attention", self.attention, ATTENTIONS)
        require_choice("device", self.device, DEVICES)
        for name in ("micro_batch", "seq_len", "accumulation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}")

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass on one rank."""
        return self.micro_batch * self.seq_len
