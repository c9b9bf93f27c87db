"""Owns the exact count of updated parameters of a plan. May import the standard library and schedule only."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from progtuning_ds.errors import ConfigError
from progtuning_ds.schedule import Stage, StagePlan


@dataclass(frozen=True, slots=True)
class ComponentCounts:
    """Trainable parameters of each component of a model; tied weights are counted once.

    `always_embeddings` and `always_blocks[b]` are the share of `embeddings` and `blocks[b]` that trains in every
    stage because of a plan's `always_train`; they are included in `embeddings` and `blocks`. An empty
    `always_blocks` means none.
    """

    embeddings: int
    blocks: tuple[int, ...]
    head: int
    always_embeddings: int = 0
    always_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        always = self.always_blocks or (0,) * len(self.blocks)
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "always_blocks", tuple(always))
        if len(self.always_blocks) != len(self.blocks):
            raise ConfigError(
                f"always_blocks must hold one count for each of the {len(self.blocks)} blocks, got {always}"
            )
        if not 0 <= self.always_embeddings <= self.embeddings or self.head < 0:
            raise ConfigError(f"counts must not be negative, nor always_embeddings above embeddings, got {self}")
        if not all(0 <= extra <= block for extra, block in zip(self.always_blocks, self.blocks, strict=True)):
            raise ConfigError(f"always_blocks must lie within 0 and the count of the block, got {self}")

    @property
    def total(self) -> int:
        """Parameters that full fine-tuning updates in one step."""
        return self.embeddings + sum(self.blocks) + self.head

    def trainable(self, stage: Stage) -> int:
        """Parameters that one step of `stage` updates."""
        trains = set(stage.trainable_blocks)
        in_blocks = sum(
            count if block in trains else always
            for block, (count, always) in enumerate(zip(self.blocks, self.always_blocks, strict=True))
        )
        return self.head + in_blocks + (self.embeddings if stage.embeddings else self.always_embeddings)


@dataclass(frozen=True, slots=True)
class StageAccount:
    """What one stage costs: parameters per step, its length, and updated parameters in the paper's unit."""

    index: int
    trainable_params: int
    epochs: Fraction
    updated_params: Fraction


@dataclass(frozen=True, slots=True)
class RunAccount:
    """What a run costs.

    The paper's measure (arXiv 2506.21119, section 4): the sum over epochs of the parameters that train in that
    epoch, so one step counts as `1 / steps_per_epoch` of its trainable parameters.
    """

    stages: tuple[StageAccount, ...]
    exact_updated_params: Fraction
    exact_updated_params_full: Fraction

    @property
    def updated_params(self) -> int:
        """Updated parameters of the run, rounded to a whole number (exact when stages are whole epochs)."""
        return round(self.exact_updated_params)

    @property
    def updated_params_full(self) -> int:
        """The same for full fine-tuning over the same epochs."""
        return round(self.exact_updated_params_full)

    @property
    def saving(self) -> float:
        """Fraction of updated parameters that the plan saves against full fine-tuning, 0..1."""
        if not self.exact_updated_params_full:
            return 0.0
        return float(1 - self.exact_updated_params / self.exact_updated_params_full)


def account(counts: ComponentCounts, plan: StagePlan, steps_per_epoch: int | Fraction) -> RunAccount:
    """Count the updated parameters of `plan` on a model with `counts`.

    Args:
        counts: parameters of each component.
        plan: what trains when; its `num_blocks` must be that of `counts`.
        steps_per_epoch: optimizer steps per epoch; positive.

    Raises:
        ConfigError: if plan and counts differ in blocks, or `steps_per_epoch` is not positive.
    """
    if plan.num_blocks != len(counts.blocks):
        raise ConfigError(f"plan.num_blocks must be {len(counts.blocks)} as the model's, got {plan.num_blocks}")
    if steps_per_epoch <= 0:
        raise ConfigError(f"steps_per_epoch must be positive, got {steps_per_epoch!r}")
    stages = []
    for stage in plan.stages:
        epochs = Fraction(len(stage.steps)) / Fraction(steps_per_epoch)
        trainable = counts.trainable(stage)
        stages.append(StageAccount(stage.index, trainable, epochs, trainable * epochs))
    return RunAccount(
        stages=tuple(stages),
        exact_updated_params=sum((stage.updated_params for stage in stages), Fraction(0)),
        exact_updated_params_full=counts.total * Fraction(plan.total_steps) / Fraction(steps_per_epoch),
    )
