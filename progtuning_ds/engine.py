"""The stage engine: retargets a live DeepSpeed engine to another set of parameters that train.

Owns when a transition is legal, what it is compared against on the other ranks, and what is reported. How state is
held and moved is ``progtuning_ds.zero``'s; what trains when is the plan's. May import anything below, but no
``deepspeed.runtime``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from progtuning_kernels import MaskedStep

from progtuning_ds.blocks import BlockMap, full_shape, set_trainable
from progtuning_ds.errors import StageTransitionError, did_you_mean
from progtuning_ds.grouping import free_backward
from progtuning_ds.regroup import GroupPlan, fingerprint, plan_groups
from progtuning_ds.schedule import Stage, StagePlan
from progtuning_ds.transfer import DEFAULT_CHUNK_BYTES
from progtuning_ds.transition import StageTransition, describe
from progtuning_ds.zero import Adapter, build_adapter
from progtuning_ds.zero.checkpoints import complete_checkpoints
from progtuning_ds.zero.compression import Compression
from progtuning_ds.zero.fused import FusedStep, take_over_step

logger = logging.getLogger(__name__)


class StageEngine:
    """Makes a live DeepSpeed engine follow a stage plan.

    >>> stages = StageEngine(engine, plan, blocks)
    >>> for step in range(plan.total_steps):      # optimizer steps
    ...     transition = stages.advance(step)     # None, or a StageTransition
    ...     ...                                   # forward, backward and step as ever

    Args:
        engine: what ``deepspeed.initialize`` returned.
        plan: what trains when.
        blocks: what ``discover_blocks(model)`` returned.
        chunk_bytes: limit of extra memory per rank while state moves (default 64 MB). Planned boundaries need none.
        lr_scheduler: a scheduler the engine does not know, because you step it yourself; default the engine's own.
        kernel: who does the optimizer step: "deepspeed" (default), "triton", "reference" (plain PyTorch), or "auto"
            (the best fused step there is for the device and flavour, else DeepSpeed's).
        on_freeze: what becomes of the linear layers' weights of a block that the plan has frozen for good: "keep", or
            "int8" or "nf4" to quantize them, which gives back most of their memory. They cannot train again.

    Raises:
        UnsupportedDeepSpeedError: for a feature or version of DeepSpeed that cannot be retargeted, by name.
        StageTransitionError: if ranks hold different plans, or the optimizer holds parameters that are frozen.
        ValueError: if plan, blocks and model do not fit each other, or ``on_freeze`` does not fit them.
    """

    def __init__(
        self,
        engine: Any,
        plan: StagePlan,
        blocks: BlockMap,
        *,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        lr_scheduler: Any | None = None,
        kernel: str = "deepspeed",
        on_freeze: str = "keep",
    ) -> None:
        if plan.num_blocks != len(blocks):
            raise ValueError(f"plan.num_blocks must be {len(blocks)} as the model's, got {plan.num_blocks}")
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
        self.engine = engine
        self.plan = plan
        self.blocks = blocks
        self.chunk_bytes = chunk_bytes
        self._adapter = build_adapter(engine)
        self._adapter.hyper.scheduler = lr_scheduler if lr_scheduler is not None else engine.lr_scheduler
        self._stage: Stage | None = None
        self._fused: FusedStep | None = None
        self._check_names()
        parts = (blocks.blocks, blocks.embeddings, blocks.head)
        self._check_same_everywhere("the plan or the model", plan, *parts, on_freeze)
        self._check_nothing_frozen()
        self._compression = None if on_freeze == "keep" else Compression(self._adapter, plan, blocks, on_freeze)
        free_backward(engine.module, plan, blocks)
        complete_checkpoints(engine)
        self._fused = take_over_step(self._adapter, kernel)

    @property
    def stage(self) -> Stage:
        """The current stage; stage 0 before the first ``advance``."""
        return self._stage or self.plan.stages[0]

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Names of the parameters the engine trains now, in buffer order; without those ``freeze`` holds."""
        held = self._fused.masked if self._fused is not None else frozenset()
        params = self._adapter.params
        return tuple(name for group in self._adapter.groups() for name in group if id(params[name]) not in held)

    @property
    def adapter(self) -> Adapter:
        """What reads and changes the engine's buffers, for code that saves and restores them."""
        return self._adapter

    @property
    def on_freeze(self) -> str:
        """What becomes of blocks that freeze for good: "keep", "int8" or "nf4"."""
        return "keep" if self._compression is None else self._compression.kind

    @property
    def compression(self) -> Compression | None:
        """What quantizes frozen blocks, and makes them dense again to export; None with ``on_freeze="keep"``."""
        return self._compression

    @property
    def kernel(self) -> str:
        """Who does the optimizer step: "deepspeed", or the fused one as "triton", "reference" or "fused_cpu"."""
        return "deepspeed" if self._fused is None else self._fused.implementation

    @property
    def masked_step(self) -> MaskedStep | None:
        """The fused step's kernels, for measurements (bytes moved, device flags); None where DeepSpeed steps.

        Made anew by every transition.
        """
        return None if self._fused is None else self._fused.masked_step

    def memory(self) -> dict[str, int]:
        """Bytes this rank holds now per category: weights, master_weights, exp_avg, exp_avg_sq, gradients, ..."""
        return self._adapter.memory()

    def advance(self, step: int) -> StageTransition | None:
        """Enter the stage that optimizer step ``step`` belongs to; call it before the step's forward.

        Collective when a stage begins, free otherwise. Calling it again with the same step does nothing, so a resumed
        loop may start anywhere.

        Returns:
            None, or what the transition did.

        Raises:
            StageTransitionError: in mid-accumulation, or if ranks disagree. Nothing was changed.
            ValueError: if ``step`` is outside the plan.
        """
        stage = self.plan.stage_at(step)
        if self._stage is not None and stage.index == self._stage.index:
            return None
        target = self.blocks.trainable_names(stage, self.plan.always_train)
        transition = None
        done_with = self._compression.due(stage) if self._compression is not None else ()
        if done_with or set(target) != set(self.trainable_names):
            transition = self._retarget(target, stage.index, step, done_with)
            logger.info("%s", describe(transition, len(self.plan.stages)))
        self._stage = stage
        return transition

    def retarget(self, names: Iterable[str]) -> StageTransition:
        """Train exactly the parameters ``names`` from now on, whatever trained before; collective.

        Parameters in both sets keep their master, moments and step count to the bit; parameters that join start with
        fresh state; what the others held is released.

        Raises:
            ConfigError: for a name the model does not have, or no name at all.
        """
        return self._retarget(tuple(dict.fromkeys(names)), None, None)

    def freeze(self, names: Iterable[str]) -> None:
        """Stop training ``names`` at once, at any point of a step and without communication; every rank must call it.

        The fused step leaves their weights and state as they are, to the bit, and neither reads nor counts their
        gradients. What they hold is released by the next transition, or by ``compact()``.

        Raises:
            StageTransitionError: if DeepSpeed does the step, which has no mask.
            ValueError: for a name that does not train.
        """
        if self._fused is None:
            raise StageTransitionError(
                "freeze needs the fused step: pass kernel='auto' to StageEngine, or use retarget between steps"
            )
        now = self.trainable_names
        leaving = set(names)
        for name in sorted(leaving - set(now)):
            raise ValueError(f"names must train now, got {name!r}{did_you_mean(name, now)}")
        target = [name for name in now if name not in leaving]
        if not target:
            raise ValueError("names must leave at least one parameter that trains, got all of them")
        set_trainable(self.engine.module, target)
        held = {name for group in self._adapter.groups() for name in group} - set(target)
        self._fused.mask(self._adapter.params[name] for name in held)

    def compact(self) -> StageTransition:
        """Release what frozen parameters still hold: ``retarget`` to what trains now; collective."""
        return self.retarget(self.trainable_names)

    def _retarget(
        self, target: tuple[str, ...], stage: int | None, step: int | None, done_with: tuple[int, ...] = ()
    ) -> StageTransition:
        adapter = self._adapter
        self._check_target(target)
        self._check_boundary()
        self._check_same_everywhere("what shall train", target, stage, step)
        began = time.perf_counter()
        before = adapter.memory()
        plan = self._plan(target)
        adapter.check(plan)
        set_trainable(self.engine.module, target)
        if self._fused is not None:
            self._fused.release()
        moved = adapter.regroup(plan, self.chunk_bytes)
        if self._compression is not None:
            self._compression.quantize(done_with)
        if not get_accelerator().is_synchronized_device():
            get_accelerator().empty_cache()  # freed blocks go back to the device, not only to torch's pool
        after = adapter.memory()
        return StageTransition(
            stage=stage,
            step=step,
            frozen=plan.leaving,
            unfrozen=plan.joining,
            released_bytes={key: before.get(key, 0) - after.get(key, 0) for key in {**before, **after}},
            memory_bytes=after,
            moved_bytes=moved,
            planned=plan.only_drops,
            seconds=time.perf_counter() - began,
        )

    def _plan(self, target: tuple[str, ...]) -> GroupPlan:
        hyper = self._adapter.hyper
        groups = self._adapter.groups()
        for group, origin in zip(groups, hyper.origins, strict=True):
            hyper.remember(group, origin)
        held = {name for group in groups for name in group}
        joining = {name: hyper.origin_for(name, self._decays(name)) for name in target if name not in held}
        return plan_groups(groups, hyper.origins, target, joining)

    def _decays(self, name: str) -> bool:
        return len(full_shape(self._adapter.params[name])) >= 2

    # ---- checks ------------------------------------------------------------------------------------------------

    def _check_names(self) -> None:
        known = {name for part in (self.blocks.embeddings, *self.blocks.blocks, self.blocks.head) for name in part}
        strangers = sorted(known - self._adapter.params.keys())
        if strangers:
            raise ValueError(f"blocks must come from the engine's model, which has no parameter {strangers[0]!r}")

    def _check_target(self, target: tuple[str, ...]) -> None:
        params = self._adapter.params
        quantized = self._compression.names if self._compression is not None else frozenset()
        for name in target:
            if name not in params:
                raise ValueError(f"names must be parameters of the model, got {name!r}{did_you_mean(name, params)}")
            if name in quantized:
                raise StageTransitionError(
                    f"names must hold no weight that was quantized when its block froze (on_freeze), got {name!r}; it "
                    f"cannot train again, nothing was changed"
                )

    def _check_nothing_frozen(self) -> None:
        frozen = [name for name in self.trainable_names if not self._adapter.params[name].requires_grad]
        if frozen:
            raise StageTransitionError(
                f"the optimizer holds {len(frozen)} frozen parameters, e.g. {frozen[0]!r}; DeepSpeed would go on "
                f"moving them with momentum and weight decay: freeze before deepspeed.initialize, or let StageEngine "
                f"do it"
            )

    def _check_boundary(self) -> None:
        engine = self.engine
        accumulation = engine.gradient_accumulation_steps()
        # Whoever sets the boundaries by hand (accelerate does) need not step after every micro-batch, and may
        # accumulate fewer at the end of an epoch: micro_steps then counts something else.
        by_hand = getattr(engine, "_is_gradient_accumulation_boundary", None)
        if by_hand is False:
            raise StageTransitionError(
                "a transition is legal only between optimizer steps, got one in mid-accumulation"
            )
        if by_hand is None and engine.micro_steps % accumulation != 0:
            raise StageTransitionError(
                f"a transition is legal only between optimizer steps, got one after micro-batch "
                f"{engine.micro_steps % accumulation} of {accumulation}"
            )
        if self._adapter.holds_gradients():
            raise StageTransitionError(
                "a transition is legal only between optimizer steps, got one after backward() and before step()"
            )
        if getattr(self._adapter.wrapper, "offloaded_states", None):
            raise StageTransitionError("a transition needs all states in place; call engine.reload_states() first")

    def _check_same_everywhere(self, what: str, *values: object) -> None:
        own = fingerprint(*values)
        # As a float64 pair: min and max of integers are not reduced exactly by every backend.
        halves = torch.tensor([own >> 32, own & 0xFFFFFFFF], dtype=torch.float64)
        device = get_accelerator().current_device_name()
        bounds = torch.cat([halves, -halves]).to(device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self._adapter.ranks.group)
        highest, lowest = bounds[:2], -bounds[2:]
        if not torch.equal(highest, lowest):
            raise StageTransitionError(f"ranks disagree on {what}; every rank must pass the same, nothing was changed")
