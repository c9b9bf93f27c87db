"""What a configuration costs in time, in one unit, so that two can be compared. Standard library only.

The unit is the time in which one rank computes forward and backward of one token (6 FLOPs per parameter). Everything
else is bytes per parameter over a bandwidth, as a multiple of that. The figures assume a machine of H100 class:
400 TFLOP/s sustained, 200 GB/s between GPUs, 3 TB/s device memory, 25 GB/s to the host, 100 GB/s host memory per rank.
Only the order that follows from them matters, and each is a field that can be changed.
"""

from __future__ import annotations

from dataclasses import dataclass

_TOKEN_SECONDS = 6 / 400e12


def _tokens(bytes_per_parameter: float, bytes_per_second: float) -> float:
    return bytes_per_parameter / bytes_per_second / _TOKEN_SECONDS


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs in tokens of compute.

    Attributes:
        launch: of every forward pass, whatever its size.
        recompute: factor on compute with activation checkpointing: one more forward, a third of forward and backward.
        reduce: reducing bit16 gradients: every step, from ZeRO-2 on every forward pass.
        gather: gathering bit16 weights, once a step in ZeRO-1 and 2, twice every forward pass in ZeRO-3.
        update: DeepSpeed's own optimizer step: 74 bytes per element a rank owns (measured by counting its tensors).
        fused_update: the fused step: 34 bytes.
        offload: with optimizer offload: gradient down, weight up, and Adam in host memory, per element a rank owns.
        visit: moments that wait in host memory: two of them up and down, per element a rank owns.
        offload_param: ZeRO-3 weights from host memory, per element a rank owns, twice every forward pass.
    """

    launch: float = 256.0
    recompute: float = 4 / 3
    reduce: float = _tokens(2, 200e9)
    gather: float = _tokens(2, 200e9)
    update: float = _tokens(74, 3e12)
    fused_update: float = _tokens(34, 3e12)
    offload: float = _tokens(4, 25e9) + _tokens(28, 100e9)
    visit: float = _tokens(16, 25e9)
    offload_param: float = _tokens(2, 25e9)

    def forward_pass(
        self, tokens: int, *, zero_stage: int, ranks: int, checkpointing: bool, offload_param: bool, trained: float
    ) -> float:
        """Cost of one forward and backward pass; ``trained`` is the share of parameters that train."""
        cost = tokens * (self.recompute if checkpointing else 1.0) + self.launch
        if ranks > 1 and zero_stage >= 2:
            cost += self.reduce * trained
        if ranks > 1 and zero_stage == 3:
            cost += 2 * self.gather
        if offload_param:
            cost += 2 * self.offload_param / ranks
        return cost

    def step(
        self,
        *,
        zero_stage: int,
        ranks: int,
        offload_optimizer: bool,
        fused: bool,
        trained: float,
        waiting: float = 0.0,
    ) -> float:
        """Cost of one optimizer step, beside its passes; moments of the share ``waiting`` visit from host memory."""
        owners = ranks if zero_stage else 1
        update = self.offload if offload_optimizer else self.fused_update if fused else self.update
        cost = (trained * update + waiting * self.visit) / owners
        if ranks > 1 and zero_stage < 2:
            cost += self.reduce * trained
        if ranks > 1 and zero_stage in (0, 1, 2):
            cost += self.gather * trained
        return cost
