"""What one rank holds in one stage, by category: the answer of ``Workload.footprint``. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

STATES = ("weights", "quantized_weights", "master_weights", "exp_avg", "exp_avg_sq", "other_state")
"""What ``StageEngine.memory()`` reports beside gradients; ``quantized_weights`` are those of ``on_freeze``."""
CATEGORIES = (
    *STATES,
    "gradients",
    "buckets",
    "gathered",
    "activations",
    "logits",
    "step",
)
"""In the order in which a plot stacks them. ``gathered`` are ZeRO-3 weights while they are whole, and a quantized
one while its layer computes; ``logits`` includes the loss, ``step`` is what the optimizer step needs for a moment."""
MOMENTS = ("forward", "backward", "step")
"""``forward`` is its end, where activations are most; ``backward`` its end, where gradients are most."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one rank in one stage.

    Attributes:
        stage: index of the stage.
        states: what stays from step to step on the device, by category.
        moments: for each of ``MOMENTS``, everything on the device by category.
        host: what stays in host memory.
    """

    stage: int
    states: Mapping[str, int]
    moments: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak_moment(self) -> str:
        """The moment with most on the device."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def device(self) -> Mapping[str, int]:
        """Everything on the device by category, at the peak."""
        return self.moments[self.peak_moment]

    @property
    def peak(self) -> int:
        """Most bytes on the device at any moment."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """Bytes in host memory."""
        return sum(self.host.values())
