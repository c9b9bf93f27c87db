"""Puts saved state back into a live stage engine, on any number of ranks and under any ZeRO stage.

Every rank reads the slices it holds and nothing else; no communication but the engine's own when a stage is entered.
No deepspeed.runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from progtuning_ds.blocks import full_shape
from progtuning_ds.checkpoint import agreement
from progtuning_ds.checkpoint.blockwise import read_blockwise
from progtuning_ds.checkpoint.fragments import MASTER, WEIGHTS, Fragments, read_fragments
from progtuning_ds.checkpoint.plain_values import decode
from progtuning_ds.checkpoint.rng import restore_rng, seed_new_rank
from progtuning_ds.checkpoint.snapshot import scale_tensors
from progtuning_ds.checkpoint.tensor_file import TensorReader
from progtuning_ds.engine import StageEngine
from progtuning_ds.errors import CheckpointError, did_you_mean
from progtuning_ds.zero.held_state import HeldBuffer, HeldWeights, held_buffers, held_weights, settle
from progtuning_ds.zero.hyper_state import set_plain_state

_ADAMS = ("Adam", "AdamW", "DeepSpeedCPUAdam")
"""Optimizers whose state means the same, but for the type of the step count."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint's content but for its tensors.

    Attributes:
        folder: where the files are.
        step: optimizer steps done.
        shared: what `snapshot.shared_state` said.
        ranks: what `snapshot.rank_state` described, of every rank.
        files: the tensor file of every rank.
    """

    folder: Path
    step: int
    shared: Mapping[str, Any]
    ranks: Sequence[Mapping[str, Any]]
    files: Sequence[str]

    @property
    def fragments(self) -> Fragments:
        """Where the elements of all parameters are."""
        return read_fragments(zip(self.files, self.ranks, strict=True))


def check_fits(stages: StageEngine, saved: Saved) -> None:
    """Raise unless the checkpoint is of this model and this plan, on an engine that has not trained yet.

    Raises:
        CheckpointError: one line that names the checkpoint and the first thing that differs.
    """
    shapes = {name: list(full_shape(param)) for name, param in stages.adapter.params.items()}
    theirs = saved.shared["shapes"]
    for name, shape in shapes.items():
        if name not in theirs:
            near = did_you_mean(name, theirs)
            raise CheckpointError(f"checkpoint {saved.folder} is of another model: it has no parameter {name!r}{near}")
        if theirs[name] != shape:
            raise CheckpointError(
                f"checkpoint {saved.folder} is of another model: {name!r} has shape {tuple(theirs[name])} there and "
                f"{tuple(shape)} here"
            )
    for name in theirs:
        if name not in shapes:
            raise CheckpointError(f"checkpoint {saved.folder} is of another model: {name!r} is not in this one")
    if saved.shared["plan"] != stages.plan.to_dict():
        raise CheckpointError(
            f"checkpoint {saved.folder} is of another stage plan: {_first_difference(saved.shared['plan'], stages)}"
        )
    if saved.shared.get("on_freeze", "keep") != stages.on_freeze:
        raise CheckpointError(
            f"checkpoint {saved.folder} was made with on_freeze {saved.shared.get('on_freeze', 'keep')}, and this "
            f"engine has {stages.on_freeze}"
        )
    if stages.engine.global_steps:
        raise CheckpointError(
            f"a checkpoint goes into a fresh engine, and this one has done {stages.engine.global_steps} steps"
        )


def restore(stages: StageEngine, saved: Saved) -> None:
    """Bring a fresh engine to where the checkpoint was made. Collective.

    The trainable set comes first: the engine goes through the same stages, without a step, so that its buffers have
    the layout they had. Then weights, masters and optimizer state, then everything else, random generators last.

    Raises:
        CheckpointError: if the checkpoint does not fit the engine.
    """
    check_fits(stages, saved)
    _enter_stage(stages, saved)
    # What fails on one rank alone fails on all, or the others would wait for it in their first step.
    agreement.on_all(lambda: _read_own(stages, saved))
    settle(stages.adapter)


def _read_own(stages: StageEngine, saved: Saved) -> None:
    """Fill everything this rank holds; without communication."""
    adapter, fragments = stages.adapter, saved.fragments
    device = torch.device(get_accelerator().current_device_name())
    plain = decode(saved.shared["plain"], device)
    with torch.no_grad(), TensorReader(saved.folder) as reader:
        for place in held_weights(adapter):
            _fill_weights(place, fragments, reader)
        for buffer in held_buffers(adapter):
            _Filler(saved, fragments, reader, device, adapter.torch_optimizer, plain["optimizer"]).fill(buffer)
        _restore_module_buffers(stages, saved, reader)
        for name, tensor in scale_tensors(stages.engine.module).items():
            tensor.copy_(reader.read(saved.files[0], name))
        set_plain_state(adapter, plain)
        rank = adapter.ranks.rank
        if rank < len(saved.ranks):
            generators = {
                name: reader.read(saved.files[rank], name) for name in reader.names(saved.files[rank], "rng.")
            }
            restore_rng(generators, decode(saved.ranks[rank]["rng"]))
        else:
            seed_new_rank(saved.step, rank)


def _enter_stage(stages: StageEngine, saved: Saved) -> None:
    for stage in stages.plan.stages[: saved.shared["stage"] + 1]:
        stages.advance(stage.steps.start)
    wanted = [set(group) for group in saved.shared["groups"]]
    if set().union(*wanted) != {name for group in stages.adapter.groups() for name in group}:
        stages.retarget([name for group in saved.shared["groups"] for name in group])  # it had left the plan
    if [set(group) for group in stages.adapter.groups()] != wanted:
        raise CheckpointError(
            f"checkpoint {saved.folder} has other parameter groups; build the engine with progtuning_ds.param_groups, "
            f"or with the groups it had, and the same weight decay"
        )
    if saved.shared["masked"]:
        stages.freeze(saved.shared["masked"])


def _fill_weights(place: HeldWeights, fragments: Fragments, reader: TensorReader) -> None:
    target = place.tensor
    if place.numel == target.numel() and not target.is_contiguous():
        whole = torch.empty(place.numel, dtype=target.dtype)
        _fill(whole, WEIGHTS, place.name, place.start, place.numel, fragments, reader)
        target.copy_(whole.view(target.shape))
    else:
        _fill(target.view(-1), WEIGHTS, place.name, place.start, place.numel, fragments, reader)


def _fill(
    target: torch.Tensor, kind: str, param: str, start: int, numel: int, fragments: Fragments, reader: TensorReader
) -> None:
    for piece in fragments.slices(kind, param, start, numel):
        count = piece.stop - piece.start
        target[piece.at : piece.at + count].copy_(reader.read(piece.file, piece.tensor, piece.start, piece.stop))


@dataclass(frozen=True)
class _Filler:
    """Fills buffers of the optimizer."""

    saved: Saved
    fragments: Fragments
    reader: TensorReader
    device: torch.device
    optimizer: torch.optim.Optimizer
    saved_optimizer: str

    def fill(self, buffer: HeldBuffer) -> None:
        file, source = self._twin(buffer)
        if source["opaque"]:
            self._fill_opaque(buffer, file, source)
            return
        flat = buffer.master.detach().view(-1)
        for span in buffer.spans:
            kind = MASTER if MASTER in self.fragments.kinds(span.param) else WEIGHTS
            if not buffer.aliased:
                self._fill_span(flat, kind, span)
        if not source["has_state"]:
            return
        self._check_optimizer()
        state = self.optimizer.state[buffer.master]
        for kind in sorted(source["kinds"].keys() - {MASTER}):
            dtype = self.reader.dtype(file, source["kinds"][kind])
            if not torch.is_tensor(state.get(kind)) or state[kind].shape != buffer.master.shape:
                state[kind] = torch.zeros_like(buffer.master, dtype=dtype, memory_format=torch.contiguous_format)
            for span in buffer.spans:
                self._fill_span(state[kind].view(-1), kind, span)
        state.update({key: self._scalar(key, value) for key, value in source["scalars"].items()})

    def _fill_span(self, flat: torch.Tensor, kind: str, span: Any) -> None:
        target = flat[span.offset : span.offset + span.numel]
        _fill(target, kind, span.param, span.start, span.numel, self.fragments, self.reader)

    def _twin(self, buffer: HeldBuffer) -> tuple[str, Mapping[str, Any]]:
        """A saved buffer that speaks for this one, and its file: of its parameters, or of its group if it has none.

        A rank whose share is all padding has optimizer state too.
        """
        names = {span.param for span in buffer.spans}
        found = [
            (file, saved)
            for file, rank in zip(self.saved.files, self.saved.ranks, strict=True)
            for saved in rank["buffers"]
            if (names & {span[0] for span in saved["spans"]} if names else saved["group"] == buffer.group)
        ]
        if not found:
            raise CheckpointError(f"checkpoint {self.saved.folder} has no optimizer state of {sorted(names)[:1]}")
        for _, other in found[1:]:
            first = found[0][1]
            differ = "of different steps" if any(other[key] != first[key] for key in ("scalars", "has_state")) else None
            if other["opaque"].keys() != first["opaque"].keys():
                differ = "kept in different ways"
            if differ is not None:
                raise CheckpointError(
                    f"checkpoint {self.saved.folder} cannot be loaded into this ZeRO stage: the optimizer state of "
                    f"{min(names)!r} and its neighbours is {differ}; load it with the number of ranks and the ZeRO "
                    f"stage it was saved with"
                )
        same = [one for one in found if [tuple(span) for span in one[1]["spans"]] == _plain_spans(buffer)]
        return (same or found)[0]

    def _fill_opaque(self, buffer: HeldBuffer, file: str, source: Mapping[str, Any]) -> None:
        """State that is not laid out like its master: as it is into the same buffer, in new blocks into another."""
        self._check_optimizer()
        if [tuple(span) for span in source["spans"]] == _plain_spans(buffer):
            tensors = {key: self.reader.read(file, name) for key, name in source["opaque"].items()}
        else:
            try:
                tensors = read_blockwise(buffer, source, file, self.fragments, self.reader)
            except CheckpointError as error:
                raise CheckpointError(
                    f"checkpoint {self.saved.folder} holds optimizer state that cannot be cut: {error}; load it with "
                    f"the number of ranks and the ZeRO stage it was saved with"
                ) from error
        if not buffer.aliased:
            for span in buffer.spans:
                self._fill_span(buffer.master.detach().view(-1), MASTER, span)
        state = self.optimizer.state[buffer.master]
        state.update({key: tensor.to(buffer.master.device) for key, tensor in tensors.items()})
        state.update({key: self._scalar(key, value) for key, value in source["scalars"].items()})

    def _check_optimizer(self) -> None:
        now = type(self.optimizer).__name__
        if now != self.saved_optimizer and not (now in _ADAMS and self.saved_optimizer in _ADAMS):
            raise CheckpointError(
                f"checkpoint {self.saved.folder} holds the state of {self.saved_optimizer}, which {now} cannot take "
                f"over"
            )

    def _scalar(self, key: str, value: Any) -> Any:
        decoded = decode(value, self.device)
        if key != "step" or type(self.optimizer).__name__ == self.saved_optimizer:
            return decoded
        steps = float(decoded)
        if type(self.optimizer).__name__ == "DeepSpeedCPUAdam":
            return int(steps)
        group = self.optimizer.param_groups[0]
        on_device = group.get("capturable") or group.get("fused")
        return torch.tensor(steps, dtype=torch.float32, device=self.device if on_device else "cpu")


def _plain_spans(buffer: HeldBuffer) -> list[tuple[Any, ...]]:
    return [(span.param, span.start, span.numel, span.offset) for span in buffer.spans]


def _restore_module_buffers(stages: StageEngine, saved: Saved, reader: TensorReader) -> None:
    rank = stages.adapter.ranks.rank
    file = saved.files[rank if rank < len(saved.files) else 0]
    own = dict(stages.engine.module.named_buffers())
    for name in reader.names(file, "module."):
        own[name.removeprefix("module.")].copy_(reader.read(file, name))


def _first_difference(theirs: Mapping[str, Any], stages: StageEngine) -> str:
    ours = stages.plan.to_dict()
    for key in ("num_blocks", "always_train"):
        if theirs[key] != ours[key]:
            return f"{key} is {theirs[key]} there and {ours[key]} here"
    if len(theirs["stages"]) != len(ours["stages"]):
        return f"{len(theirs['stages'])} stages there and {len(ours['stages'])} here"
    for index, (their, our) in enumerate(zip(theirs["stages"], ours["stages"], strict=True)):
        for key, value in our.items():
            if their[key] != value:
                return f"stages[{index}].{key} is {their[key]} there and {value} here"
    return "its blocks are divided into other parts"
