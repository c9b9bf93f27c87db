"""Owns the schedule of a Hugging Face `Trainer` run and its settings. Imports transformers; no deepspeed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from progtuning_ds.blocks import BlockMap, discover_blocks, set_trainable
from progtuning_ds.errors import ConfigError
from progtuning_ds.schedule import StagePlan, plan_stages
from progtuning_ds.trainer.plain import PlainStages, rebuild_ddp
from progtuning_ds.trainer.progressive import make_progressive
from progtuning_ds.transition import StageTransition

if TYPE_CHECKING:
    from progtuning_ds.engine import StageEngine

logger = logging.getLogger(__name__)


class ProgtuningCallback(TrainerCallback):
    """Makes a `Trainer` train in stages; under DeepSpeed on its live engine, else on its own optimizer.

    >>> trainer = Trainer(..., callbacks=[ProgtuningCallback(num_stages=3)])
    >>> trainer.train()

    Optimizer, learning-rate scheduler, accumulation, evaluation, checkpoints and resume stay the Trainer's. Without
    DeepSpeed that is one process or plain DDP.

    Args:
        num_stages: number of stages T; by default one per epoch.
        embeddings: when the embeddings train: "always" (the paper's choice), "first_stage" or "never".
        stage_lengths: length of each stage in `length_unit`; by default all stages are equally long.
        length_unit: "fractions" or "steps" (optimizer steps).
        always_train: fnmatch patterns of parameter names that train in every stage.
        plan: a finished plan, in place of all of the above; its steps must be those of the run.
        blocks_path: path of the module list that holds the blocks; by default it is found by structure.
        kernel: who does the optimizer step under DeepSpeed; see `StageEngine`.

    Attributes:
        plan: the plan of the current run; None before.
        stages: what carries it out, a `StageEngine` or a `PlainStages`; None before.
        transitions: what every transition of the run did on this rank.
    """

    def __init__(
        self,
        num_stages: int | None = None,
        *,
        embeddings: str = "always",
        stage_lengths: Sequence[float] | None = None,
        length_unit: str = "fractions",
        always_train: Sequence[str] = (),
        plan: StagePlan | None = None,
        blocks_path: str | None = None,
        kernel: str = "deepspeed",
    ) -> None:
        if plan is not None and (num_stages is not None or stage_lengths is not None or always_train):
            raise ConfigError("plan is given, and so is num_stages, stage_lengths or always_train; give one of them")
        if length_unit not in ("fractions", "steps"):
            raise ConfigError(f"length_unit must be one of fractions, steps, got {length_unit!r}")
        self.num_stages = num_stages
        self.embeddings = embeddings
        self.stage_lengths = stage_lengths
        self.length_unit = length_unit
        self.always_train = tuple(always_train)
        self.given_plan = plan
        self.blocks_path = blocks_path
        self.kernel = kernel
        self.plan: StagePlan | None = None
        self.blocks: BlockMap | None = None
        self.stages: StageEngine | PlainStages | None = None
        self.transitions: list[StageTransition] = []
        self._model: Any = None
        self._trainer: Any = None  # transformers types its model and optimizer as perhaps absent
        _meet_trainers()

    def attach(self, trainer: Any) -> None:
        """Take charge of a trainer's next `train()`, which calls this by itself; may be called again.

        Raises:
            ConfigError: if the Trainer trains in a way that stages do not fit.
        """
        if trainer.is_fsdp_enabled:
            raise ConfigError("ProgtuningCallback works with DeepSpeed, plain DDP or one process, got FSDP")
        others = [one for one in trainer.callback_handler.callbacks if isinstance(one, ProgtuningCallback)]
        if len(others) > 1:
            raise ConfigError(f"a Trainer takes one ProgtuningCallback, got {len(others)}")
        self._trainer = trainer
        make_progressive(trainer, self)
        if self._model is trainer.model and self.blocks is not None:
            # A second run of the same model: what the first one froze is free again.
            set_trainable(trainer.model, [name for name in self.blocks.order if name not in self.blocks.frozen])

    # ---- what the Trainer's own steps ask (trainer/progressive.py) ----------------------------------------------

    def begin(self, trainer: Any) -> tuple[StagePlan, BlockMap]:
        """Work out the plan of the run that begins; called before the optimizer is made, and again after."""
        if self._model is not trainer.model or self.blocks is None:
            self._model = trainer.model
            self.blocks = discover_blocks(trainer.model, path=self.blocks_path)
        self.plan = self._make_plan(len(self.blocks), trainer.args, trainer.state)
        if trainer.args.load_best_model_at_end and trainer.is_deepspeed_enabled and not self.plan.is_shrinking:
            raise ConfigError(
                "load_best_model_at_end needs a plan whose stages only freeze, under DeepSpeed; "
                "this one trains again what was frozen"
            )
        return self.plan, self.blocks

    def prepared(self, trainer: Any) -> None:
        """Build the stages on the optimizer or engine that now exists, where a checkpoint to be loaded was saved."""
        plan, blocks = self.begin(trainer)
        self.transitions = []
        if trainer.is_deepspeed_enabled:
            from progtuning_ds.engine import StageEngine  # not at the top: these import DeepSpeed
            from progtuning_ds.zero.checkpoints import keep_in_exports

            wrapper = trainer.accelerator.deepspeed_engine_wrapped
            if wrapper is None:
                raise ConfigError(
                    "accelerate has prepared no DeepSpeed engine, as in a second train(); make a new Trainer"
                )
            engine = wrapper.engine
            self.stages = StageEngine(engine, plan, blocks, lr_scheduler=trainer.lr_scheduler, kernel=self.kernel)
            engine.save_checkpoint = _with_frozen(engine.save_checkpoint)
            keep_in_exports(engine, [name for name in blocks.order if name not in blocks.frozen])
        else:
            self.stages = self._plain(trainer, plan, blocks)
        self.go_to(max(trainer.state.global_step - 1, 0))

    def go_to(self, step: int) -> None:
        """Put engine or optimizer into the layout that step `step` was done in, by the way a run gets there."""
        assert self.plan is not None
        assert self.stages is not None
        for stage in self.plan.stages[: self.plan.stage_at(step).index + 1]:
            self.stages.advance(stage.steps.start)

    def go_back_to(self, step: int) -> None:
        """The same, from a later stage of a plan that only freezes: groups that left come back where they were."""
        assert self.stages is not None
        self.stages.advance(step)

    def _plain(self, trainer: Any, plan: StagePlan, blocks: BlockMap) -> PlainStages:
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        before = self.stages
        stages = PlainStages(trainer.model, optimizer, plan, blocks)
        if isinstance(before, PlainStages) and before.optimizer is optimizer:
            stages.take_over(before)  # trained before: some parameters had left
        return stages

    def _make_plan(self, num_blocks: int, args: TrainingArguments, state: TrainerState) -> StagePlan:
        total = state.max_steps
        if self.given_plan is not None:
            if self.given_plan.total_steps != total:
                raise ConfigError(f"plan must have the {total} steps of the run, got {self.given_plan.total_steps}")
            return self.given_plan
        stages = self.num_stages or (len(self.stage_lengths) if self.stage_lengths else None)
        if stages is None and args.max_steps > 0:
            raise ConfigError(f"num_stages must be given where max_steps is ({args.max_steps})")
        return plan_stages(
            num_blocks,
            stages or int(-(-args.num_train_epochs // 1)),
            total,
            self.embeddings,
            lengths=self.stage_lengths,
            length_unit=self.length_unit,
            always_train=self.always_train,
        )

    # ---- events of the Trainer -----------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that the run is in this callback's hands."""
        if self.stages is None or self._trainer is None or self._trainer.state is not state:
            raise ConfigError(
                "ProgtuningCallback has not met its Trainer, whose class replaces train(); "
                "call callback.attach(trainer) before trainer.train()"
            )
        assert self.plan is not None
        logger.info("%d stages over %d steps, from step %d", len(self.plan.stages), state.max_steps, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter the stage that the optimizer step belongs to."""
        assert self.stages is not None
        transition = self.stages.advance(state.global_step)
        if transition is not None:
            self.transitions.append(transition)
        if isinstance(self.stages, PlainStages) and self.stages.changed:
            wrapped = self._trainer.model_wrapped if self._trainer is not None else None
            if isinstance(wrapped, DistributedDataParallel):
                rebuild_ddp(wrapped)
            self.stages.changed = False


def _with_frozen(save: Any) -> Any:
    """Keep what a stage froze in checkpoints: for PEFT models the Trainer asks DeepSpeed to leave frozen weights out.

    It means the base model's, but adapters of blocks that froze would go with them.
    """

    @functools.wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        return save(*args, **{**kwargs, "exclude_frozen_parameters": False})

    return save_checkpoint


def _meet_trainers() -> None:
    """Let `Trainer.train` hand itself to its `ProgtuningCallback`; a Trainer without one trains as ever.

    Callbacks are never told who calls them, and the first event of a training run comes when optimizer and engine
    exist and a checkpoint has been loaded into them, which is too late to lay them out for the plan.
    """
    train = Trainer.train
    if getattr(train, "meets_progtuning", False):
        return

    @functools.wraps(train)
    def train_in_stages(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgtuningCallback):
                callback.attach(self)
        return train(self, *args, **kwargs)

    train_in_stages.meets_progtuning = True  # type: ignore[attr-defined]
    Trainer.train = train_in_stages
