"""The model of memory: a model under a plan, and what a rank holds of it under any engine. Standard library only.

Model states follow ``state`` to the byte (``StageEngine.memory()`` measures the same). Activations follow
``activations``. What lives for a moment only (buckets, gathered weights, the copy of a gradient in the step) is
counted at the moment it lives; the peak is the highest of these moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from progtuning_ds.memory.activations import TokenCosts, token_costs
from progtuning_ds.memory.architecture import Architecture
from progtuning_ds.memory.footprint import STATES, Footprint
from progtuning_ds.memory.parameters import Group, Param, ParamTable
from progtuning_ds.memory.passing import (
    bucket_bytes,
    gathers,
    lasting_gradients,
    scattered,
    staging,
    step_copy,
    step_gradients,
    visiting_moments,
)
from progtuning_ds.memory.setup import Batch, EngineSetup
from progtuning_ds.memory.state import FP32_BYTES, owned_numel
from progtuning_ds.memory.weights import (
    base_while_computing,
    dense_while_computing,
    gathered_bytes,
    held_weights,
    in_quantized_base,
    persistent_bytes,
    quantized_params,
)
from progtuning_ds.on_freeze import why_not
from progtuning_ds.schedule import Stage, StagePlan

_T = TypeVar("_T")
_QUANTILE_BLOCK = 256


@dataclass(frozen=True)
class Workload:
    """A model under a plan: what does not change while setups and batches are tried.

    Attributes:
        params: the model's parameters.
        shape: the model's blocks; None counts model states only.
        plan: what trains when.
    """

    params: ParamTable
    shape: Architecture | None
    plan: StagePlan
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def groups(self, stage: int) -> tuple[Group, ...]:
        """Optimizer groups of a stage."""
        return self._once(("groups", stage), lambda: self.params.groups(self.plan, stage))

    def trained(self, stage: int) -> int:
        """Elements that train in a stage."""
        return sum(group.numel for group in self.groups(stage))

    def _once(self, key: Any, compute: Callable[[], _T]) -> _T:
        """A search asks for the same sums over all parameters thousands of times."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def footprints(self, setup: EngineSetup, batches: Sequence[Batch]) -> tuple[Footprint, ...]:
        """Footprint of every stage; one batch for each."""
        return tuple(
            self.footprint(setup, batch, stage.index) for stage, batch in zip(self.plan.stages, batches, strict=True)
        )

    def footprint(self, setup: EngineSetup, batch: Batch, stage: int) -> Footprint:
        """Footprint of one stage."""
        groups = self.groups(stage)
        device, host = self._once((setup, stage), lambda: self._states(setup, stage))
        return self._with_moments(setup, batch, stage, groups, dict(device), dict(host))

    def model_states(self, setup: EngineSetup, stage: int) -> dict[str, int]:
        """Bytes by category that ``StageEngine.memory()`` reports in a stage, device and host together."""
        device, host = self._states(setup, stage)
        return {name: device.get(name, 0) + host.get(name, 0) for name in STATES}

    def why_not_quantized(self, setup: EngineSetup) -> str | None:
        """Say in words why ``on_freeze`` of this engine cannot be had, or None."""
        if setup.on_freeze == "keep":
            return None
        return why_not(
            setup.on_freeze,
            self.plan,
            self.params.matrices,
            element=setup.element,
            sharing_ranks=setup.world_size if setup.zero_stage == 3 else 1,
            offloads_parameters=setup.offload_param,
        )

    # ---- what stays --------------------------------------------------------------------------------------------

    def quantized(self, setup: EngineSetup, stage: int) -> tuple[Param, ...]:
        """Weights that lie quantized in a stage (``on_freeze``)."""
        return self._once(
            ("quantized", setup.on_freeze, stage), lambda: quantized_params(self.params, self.plan, setup, stage)
        )

    def _states(self, setup: EngineSetup, stage: int) -> tuple[dict[str, int], dict[str, int]]:
        groups, quantized = self.groups(stage), self.quantized(setup, stage)
        owned = owned_numel([group.numels for group in groups], setup.flavour)
        state = self._optimizer_state(setup, owned)
        device = held_weights(self.params, self.groups(0), setup, quantized)
        host: dict[str, int] = {}
        if setup.offload_param:
            persistent = persistent_bytes(self.params, setup)
            host["weights"], device["weights"] = device["weights"] - persistent, persistent
        (host if setup.offload_optimizer else device).update(state)
        waiting = [group for group in groups if group.last_stage in setup.host_parts]
        if waiting and not setup.offload_optimizer:
            away = self._optimizer_state(setup, owned_numel([group.numels for group in waiting], setup.flavour))
            for name in ("exp_avg", "exp_avg_sq"):
                device[name] -= away[name]
                host[name] = away[name]
        return device, host

    @staticmethod
    def _optimizer_state(setup: EngineSetup, owned: int) -> dict[str, int]:
        separate = setup.flavour.bit16 or setup.zero_stage > 0
        moment = owned * setup.state_bits // 8
        scales = 2 * FP32_BYTES * -(-owned // _QUANTILE_BLOCK) if setup.state_bits == 8 else 0
        return {
            "master_weights": FP32_BYTES * owned * separate,
            "exp_avg": moment,
            "exp_avg_sq": moment,
            "other_state": scales,
        }

    # ---- what comes and goes -----------------------------------------------------------------------------------

    def _with_moments(
        self,
        setup: EngineSetup,
        batch: Batch,
        stage: int,
        groups: Sequence[Group],
        device: dict[str, int],
        host: dict[str, int],
    ) -> Footprint:
        owned, (lasting, on_host), copied, largest = self._once(
            ("gradients", setup, stage),
            lambda: (
                owned_numel([group.numels for group in groups], setup.flavour),
                lasting_gradients(setup, [group.numels for group in groups]),
                step_copy(setup, groups) + visiting_moments(setup, groups),
                max(max(group.numels) for group in groups),
            ),
        )
        trained = self.trained(stage)
        if on_host:
            host["gradients"] = on_host + staging(setup, batch, owned, largest)
        if lasting:
            device["gradients"] = lasting
        arriving, complete = step_gradients(setup, owned, trained)
        passing, kept_low = self._activations(setup, batch, stage)
        buckets = bucket_bytes(setup, largest)
        gathered = self._gathered(setup, stage)
        held = arriving if batch.accumulation == 1 else complete
        if setup.zero_stage in (1, 2) and setup.world_size == 1:
            held *= 2  # measured: alone, a rank keeps what it accumulated beside what backward left
        forward = device | passing
        forward["gradients"] = device.get("gradients", 0) + held
        backward = device | kept_low | {"gradients": device.get("gradients", 0) + complete, "buckets": buckets}
        # ZeRO-1 and 2 let go of what other ranks update before they make their copy.
        partitioned = setup.zero_stage > 0 and not setup.fp32_gradients
        step = device | {
            "gradients": device.get("gradients", 0)
            + (min(complete, setup.element * owned) if partitioned else complete),
            "step": copied,
        }
        if setup.zero_stage == 3:
            backward["gradients"] += scattered(setup, largest)
            forward["gathered"], backward["gathered"] = gathered, self._gathered(setup, stage, reused=False)
            forward["buckets"] = buckets
        quantized = self.quantized(setup, stage)
        if quantized and self._backward_reaches_embeddings(stage):
            backward["gathered"] = backward.get("gathered", 0) + dense_while_computing(setup, quantized)
        if setup.frozen_bits < 16:  # backward begins with a layer of the base, and ends with one where it goes so far
            computing = base_while_computing(self.params, setup)
            for moment in (forward, backward):
                moment["gathered"] = moment.get("gathered", 0) + computing
        moments = {"forward": forward, "backward": backward, "step": step}
        return Footprint(stage, device, moments, host)

    def _activations(self, setup: EngineSetup, batch: Batch, stage: int) -> tuple[dict[str, int], dict[str, int]]:
        """What is kept at the end of forward, and what backward's last block still has."""
        if self.shape is None:
            return {}, {}
        costs = token_costs(
            self.shape, batch.seq_len, attention=batch.attention, element=setup.element, device=batch.device
        )
        blocks = self._kept_by_blocks(setup, costs, stage)
        embeddings = costs.embeddings.trained if self._backward_reaches_embeddings(stage) else 0.0
        highest = max((kept for kept in blocks), default=0.0)
        if batch.checkpointing:
            kept = costs.block_input * sum(1 for block in blocks if block)
            recomputed = highest
        else:
            kept, recomputed = sum(blocks), 0.0
        base = embeddings + kept + costs.head.trained
        lowest = embeddings + next((block for block in blocks if block), 0.0) + costs.workspace
        tokens = batch.tokens
        # The loss is over before the first block is recomputed: of the two, the larger counts.
        if costs.logits + costs.logits_workspace >= recomputed + costs.workspace:
            above = {"activations": tokens * base, "logits": tokens * (costs.logits + costs.logits_workspace)}
        else:
            above = {"activations": tokens * (base + recomputed + costs.workspace), "logits": 0.0}
            if not batch.checkpointing:
                above["logits"] = tokens * costs.logits
        return {name: round(value) for name, value in above.items()}, {"activations": round(tokens * lowest)}

    def _kept_by_blocks(self, setup: EngineSetup, costs: TokenCosts, stage: int) -> list[float]:
        """Bytes per token of every block; nothing below where backward stops."""
        trains = self._components(self.plan.stages[stage])
        inputs = self._shares_of_inputs(setup, stage)
        reached = "embeddings" in trains
        kept = []
        for block in range(self.params.num_blocks):
            reached = reached or block in trains
            kept.append(costs.block.always + inputs[block] * costs.block.with_weights if reached else 0.0)
        return kept

    def _shares_of_inputs(self, setup: EngineSetup, stage: int) -> list[float]:
        """Of every block, the share of its linear layers' inputs that are kept for backward."""
        blocks = range(self.params.num_blocks)
        if setup.frozen_bits == 8 or (setup.zero_stage == 3 and setup.frozen_bits == 16 and setup.on_freeze == "keep"):
            # ZeRO-3's own linear layer saves its input whether the weight trains or not, as bitsandbytes' int8 does.
            return [1.0] * len(blocks)
        wholly = frozenset[str | int](self.plan.stages[stage].trainable_blocks)
        if setup.zero_stage == 3:
            # Quantized layers are not replaced by ZeRO-3's; any other in a frozen block is.
            away = {param.name for param in self.quantized(setup, stage)}
            own = (p for p in self.params.params if not in_quantized_base(p, setup))
            wholly = wholly.union(p.component for p in own if p.decays and p.name not in away)
        return [
            share if block in wholly else 0.0 for block, share in zip(blocks, self.params.input_shares, strict=True)
        ]

    def _backward_reaches_embeddings(self, stage: int) -> bool:
        return "embeddings" in self._components(self.plan.stages[stage])

    def _components(self, stage: Stage) -> frozenset[str | int]:
        """Components that train at least partly."""
        return self._once(
            ("components", stage.index),
            lambda: frozenset(p.component for p in self.params.trains(stage, self.plan.always_train)),
        )

    def _gathered(self, setup: EngineSetup, stage: int, *, reused: bool = True) -> int:
        """Whole ZeRO-3 weights at once: the largest module, what is fetched ahead, and what backward will reuse."""
        if not gathers(setup):
            return 0
        largest, together = self._once(
            ("sharded", setup.persistence_threshold, setup.element, setup.on_freeze, setup.frozen_bits, stage),
            lambda: gathered_bytes(self.params, setup, self.quantized(setup, stage)),
        )
        at_least = largest + setup.element * setup.prefetch_bucket
        return min(together, max(at_least, setup.element * setup.max_live if reused else 0))
