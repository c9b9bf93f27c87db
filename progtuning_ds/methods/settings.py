"""What a fine-tuning method is and what it needs to know. Standard library and errors only."""

from __future__ import annotations

from dataclasses import dataclass

from progtuning_ds.errors import ConfigError, did_you_mean

KINDS = ("full", "lora", "dora", "rslora", "ia3", "adapter", "bitfit", "layernorm")
"""``lora``, ``dora``, ``rslora`` and ``ia3`` are PEFT's; ``adapter`` adds bottlenecks, ``bitfit`` trains biases,
``layernorm`` norms, ``full`` everything."""
PLACEMENTS = ("houlsby", "pfeiffer")
"""Bottlenecks after attention and feed-forward (arXiv 1902.00751), or after feed-forward alone (arXiv 2005.00247)."""
ALL_LINEAR = "all-linear"
"""In place of names in ``Method.targets``."""
QUANTIZATIONS = ("none", "nf4", "int8")
"""How the frozen base is stored: as loaded, bitsandbytes' 4-bit NormalFloat, or its 8-bit integers."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Which parameters of a model are trained, apart from the schedule, which says when.

    Attributes:
        kind: one of ``KINDS``.
        rank: of low-rank matrices; LoRA, DoRA and rsLoRA.
        alpha: LoRA's scale; the update counts ``alpha / rank`` times (``alpha / sqrt(rank)`` in rsLoRA).
        dropout: on the input of low-rank matrices, 0..1.
        targets: names of the modules that get one, or the ends of their paths; empty for the method's usual ones in
            this architecture, and ``("all-linear",)`` for every linear layer: of the blocks (adapters), or of the
            model but for its head (PEFT's methods).
        placement: one of ``PLACEMENTS``; adapters.
        reduction: width of the model over width of the bottleneck; adapters.
        train_head: whether the head of the task (not a language model's) trains too.
        quantization: of the base; one of ``QUANTIZATIONS``. Not with methods that train the base's own parameters.
        double_quant: quantize the scales of ``nf4`` as well.

    Raises:
        ConfigError: for a value that is not allowed, or settings that contradict each other.
    """

    kind: str = "full"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    placement: str = "houlsby"
    reduction: int = 16
    train_head: bool = True
    quantization: str = "none"
    double_quant: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        for name, choices in (("kind", KINDS), ("placement", PLACEMENTS), ("quantization", QUANTIZATIONS)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"method.{name} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}"
                )
        if self.targets and not self.adds_parameters:
            raise ConfigError(
                f"method.targets must be empty with method.kind {self.kind}, which adds nothing to layers, got "
                f"{list(self.targets)}"
            )
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            raise ConfigError(f"method.targets must be {ALL_LINEAR} alone or names of layers, got {list(self.targets)}")
        for name in ("rank", "reduction"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"method.dropout must be in [0, 1), got {self.dropout}")
        if self.quantization != "none" and not self.adds_parameters:
            adding = ", ".join(kind for kind in KINDS if Method(kind=kind).adds_parameters)
            raise ConfigError(
                f"method.quantization must be none with method.kind {self.kind}, which trains parameters of the "
                f"base, got {self.quantization}; it goes with {adding}"
            )

    @property
    def uses_peft(self) -> bool:
        """Whether the model is wrapped by PEFT and saved in its format."""
        return self.kind in ("lora", "dora", "rslora", "ia3")

    @property
    def adds_parameters(self) -> bool:
        """Whether what trains in the blocks is added to them, and nothing of the base itself."""
        return self.uses_peft or self.kind == "adapter"
