"""Owns the schedule: parts, stages, and which stage a step belongs to. Standard library and errors only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, pairwise
from typing import Any

from progtuning_ds.errors import ConfigError, require_choice
from progtuning_ds.stage_input import (
    Length,
    check_custom_stage,
    parse_blocks,
    read_patterns,
    require_positive_int,
    stage_ends,
)

EMBEDDINGS = ("always", "first_stage", "never")


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive blocks that freeze together; `blocks` is a non-empty `range` with step 1."""

    index: int
    blocks: range


@dataclass(frozen=True, slots=True)
class Stage:
    """What trains, and when: `steps` are optimizer steps, `trainable_blocks` sorted; the head always trains."""

    index: int
    trainable_blocks: tuple[int, ...]
    steps: range
    embeddings: bool


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The whole run: which blocks train in which optimizer steps.

    `always_train` holds fnmatch patterns on canonical parameter names that train in every stage whatever
    their component, e.g. `"*LayerNorm*"` or `"bert.pooler.*"`.

    Raises:
        ConfigError: when parts do not cover the blocks once and in order, when stages leave gaps or overlap
            in steps, or when a stage trains a part only partly.
    """

    num_blocks: int
    parts: tuple[Part, ...]
    stages: tuple[Stage, ...]
    always_train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_positive_int("num_blocks", self.num_blocks)
        object.__setattr__(self, "always_train", read_patterns(self.always_train))
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "stages", tuple(self.stages))
        self._check_parts()
        self._check_stages()

    def _check_parts(self) -> None:
        next_block = 0
        for index, part in enumerate(self.parts):
            blocks = part.blocks
            if part.index != index or blocks.start != next_block or blocks.step != 1 or not len(blocks):
                raise ConfigError(
                    f"parts[{index}] must be Part({index}, range({next_block}, ...)) and hold a block, got {part}"
                )
            next_block = blocks.stop
        if next_block != self.num_blocks:
            raise ConfigError(f"parts must cover the {self.num_blocks} blocks, got parts that end at {next_block}")

    def _check_stages(self) -> None:
        if not self.stages:
            raise ConfigError("stages must hold at least one stage, got none")
        next_step = 0
        for index, stage in enumerate(self.stages):
            steps, blocks = stage.steps, stage.trainable_blocks
            if stage.index != index:
                raise ConfigError(f"stages[{index}].index must be {index}, got {stage.index}")
            if steps.start != next_step or steps.step != 1 or not len(steps):
                raise ConfigError(
                    f"stages[{index}].steps must start at {next_step} and hold at least one step, got {steps}"
                )
            if list(blocks) != sorted({b for b in blocks if b in range(self.num_blocks)}):
                raise ConfigError(
                    f"stages[{index}].trainable_blocks must be sorted, distinct and within "
                    f"0..{self.num_blocks - 1}, got {blocks}"
                )
            for part in self.parts:
                if 0 < len(set(blocks).intersection(part.blocks)) < len(part.blocks):
                    raise ConfigError(
                        f"stages[{index}].trainable_blocks must hold part {part.index} ({part.blocks}) "
                        f"wholly or not at all, got {blocks}"
                    )
            next_step = steps.stop

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.stages[-1].steps.stop

    @property
    def boundaries(self) -> tuple[int, ...]:
        """First optimizer step of every stage but the first."""
        return tuple(stage.steps.start for stage in self.stages[1:])

    @property
    def is_shrinking(self) -> bool:
        """Whether every stage's trainable set contains the next one's, as in the paper."""
        return all(
            set(later.trainable_blocks) <= set(earlier.trainable_blocks)
            and (earlier.embeddings or not later.embeddings)
            for earlier, later in pairwise(self.stages)
        )

    def stage_at(self, step: int) -> Stage:
        """Return the stage that owns optimizer step `step` (0-based); `ConfigError` outside the run."""
        if not 0 <= step < self.total_steps:
            raise ConfigError(f"step must be within 0..{self.total_steps - 1} (the plan's steps), got {step}")
        return self.stages[bisect_right(self.boundaries, step)]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values that `from_dict` turns into an equal plan; steps are `[first, end)`."""
        return {
            "num_blocks": self.num_blocks,
            "parts": [list(part.blocks) for part in self.parts],
            "stages": [
                {
                    "index": stage.index,
                    "trainable_blocks": list(stage.trainable_blocks),
                    "steps": [stage.steps.start, stage.steps.stop],
                    "embeddings": stage.embeddings,
                }
                for stage in self.stages
            ],
            "always_train": list(self.always_train),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StagePlan:
        """Rebuild the plan that `to_dict` wrote; `ConfigError` when the values are not such a plan."""
        try:
            for index, part in enumerate(data["parts"]):
                if list(part) != list(range(part[0], part[-1] + 1)):
                    raise ConfigError(f"parts[{index}] must hold consecutive blocks, got {part}")
            return cls(
                num_blocks=data["num_blocks"],
                parts=tuple(Part(i, range(part[0], part[-1] + 1)) for i, part in enumerate(data["parts"])),
                stages=tuple(
                    Stage(s["index"], tuple(s["trainable_blocks"]), range(*s["steps"]), bool(s["embeddings"]))
                    for s in data["stages"]
                ),
                always_train=tuple(data.get("always_train", ())),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                f"plan must be a mapping as StagePlan.to_dict writes it: {type(error).__name__} {error}"
            ) from error


def partition_blocks(num_blocks: int, num_parts: int) -> tuple[Part, ...]:
    """Cut L blocks into T consecutive parts of ⌊L/T⌋; the last (top) part takes the remainder.

    Source: arXiv 2506.21119, section 3.

    Raises:
        ConfigError: if there are more parts than blocks.
    """
    require_positive_int("num_blocks", num_blocks)
    require_positive_int("num_parts", num_parts)
    if num_parts > num_blocks:
        raise ConfigError(
            f"num_stages must be at most the number of blocks, got {num_parts} stages for {num_blocks} "
            f"blocks; the nearest valid choice is {num_blocks}"
        )
    size = num_blocks // num_parts
    starts = [index * size for index in range(num_parts)]
    return tuple(
        Part(index, range(start, stop))
        for index, (start, stop) in enumerate(zip(starts, [*starts[1:], num_blocks], strict=True))
    )


def plan_stages(
    num_blocks: int,
    num_stages: int,
    total_steps: int,
    embeddings: str = "always",
    *,
    lengths: Sequence[Length] | None = None,
    length_unit: str = "steps",
    steps_per_epoch: int | None = None,
    always_train: Sequence[str] = (),
) -> StagePlan:
    """Plan the paper's schedule: stage t of T trains the embeddings, parts t..T and the head.

    Source: arXiv 2506.21119, section 3.

    Args:
        num_blocks: L, the number of blocks of the model.
        num_stages: T, at most `num_blocks`; independent of the number of epochs.
        total_steps: optimizer steps of the run, at least `num_stages`.
        embeddings: `"always"` (the paper), `"first_stage"` (train in stage 0 only) or `"never"`.
        lengths: length of every stage; equal stages when `None` (boundaries at `round(total_steps * t / T)`).
        length_unit: unit of `lengths`; `"steps"` and `"epochs"` must add up to `total_steps`, `"fractions"`
            to 1 (within 0.01, then scaled).
        steps_per_epoch: optimizer steps per epoch, needed when `length_unit` is `"epochs"`.
        always_train: fnmatch patterns of parameter names that train in every stage.

    Raises:
        ConfigError: a `ValueError` that names the wrong field.
    """
    require_positive_int("num_stages", num_stages)
    parts = partition_blocks(num_blocks, num_stages)
    require_positive_int("total_steps", total_steps)
    if total_steps < num_stages:
        raise ConfigError(f"total_steps must be at least num_stages, got {total_steps} steps for {num_stages} stages")
    require_choice("embeddings", embeddings, EMBEDDINGS)
    if lengths is None:
        ends = [round(Fraction(total_steps * (index + 1), num_stages)) for index in range(num_stages)]
    else:
        ends = stage_ends(lengths, num_stages, total_steps, length_unit, steps_per_epoch)
    stages = tuple(
        Stage(
            index=index,
            trainable_blocks=tuple(range(parts[index].blocks.start, num_blocks)),
            steps=range(start, end),
            embeddings=embeddings == "always" or (embeddings == "first_stage" and index == 0),
        )
        for index, (start, end) in enumerate(pairwise([0, *ends]))
    )
    return StagePlan(num_blocks, parts, stages, read_patterns(always_train))


def custom_plan(num_blocks: int, stages: Sequence[Mapping[str, Any]], *, always_train: Sequence[str] = ()) -> StagePlan:
    """Plan stages written out block by block; sets may shrink, grow or rotate.

    Args:
        num_blocks: L, the number of blocks of the model.
        stages: one mapping per stage: `blocks` (indices such as `[4, 5]`, or text such as `"0,4-11"`,
            `"all"` or `"none"`), `steps` (optimizer steps) and optionally `embeddings` (default `True`).
        always_train: fnmatch patterns of parameter names that train in every stage.

    Parts are the longest runs of neighbouring blocks that train in the same stages.

    Raises:
        ConfigError: a `ValueError` that names the wrong field, such as `stages[1].blocks`.
    """
    require_positive_int("num_blocks", num_blocks)
    if isinstance(stages, (str, Mapping)) or not isinstance(stages, Sequence) or not stages:
        raise ConfigError(f"stages must be a non-empty list of mappings, got {stages!r}")
    built: list[Stage] = []
    start = 0
    for index, entry in enumerate(stages):
        field = f"stages[{index}]"
        check_custom_stage(field, entry)
        blocks = parse_blocks(f"{field}.blocks", entry["blocks"], num_blocks)
        built.append(Stage(index, blocks, range(start, start + entry["steps"]), entry.get("embeddings", True)))
        start += entry["steps"]
    membership = [tuple(b in stage.trainable_blocks for stage in built) for b in range(num_blocks)]
    runs = [list(run) for _, run in groupby(range(num_blocks), key=membership.__getitem__)]
    parts = tuple(Part(index, range(run[0], run[-1] + 1)) for index, run in enumerate(runs))
    return StagePlan(num_blocks, parts, tuple(built), read_patterns(always_train))
