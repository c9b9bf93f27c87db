"""What every ZeRO flavour must offer to the stage engine, and what all of them share.

Owns names, ranks, hyper-parameter groups and the order of a retarget. Knows no flavour's attributes.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed import comm as dist

from progtuning_ds.errors import UnsupportedDeepSpeedError
from progtuning_ds.methods import held_by_quantized
from progtuning_ds.methods.frozen_linear import frozen_layers, held_beside, owner
from progtuning_ds.regroup import GroupPlan
from progtuning_ds.transfer import Ranks
from progtuning_ds.zero.cut_state import check_state
from progtuning_ds.zero.hyper import HyperParameters

Parameter = torch.nn.Parameter

MEMORY_CATEGORIES = ("weights", "master_weights", "exp_avg", "exp_avg_sq", "other_state", "gradients")
QUANTIZED = "quantized_weights"
"""Keys of ``Adapter.memory``: bytes held by this rank.

``weights`` are the model's own (bit16 or fp32) elements on this rank, trained or not, without ``quantized_weights``:
codes and scales of blocks that were quantized when they froze, a key that is there if any are. ``master_weights`` are
fp32 copies that are not the weights themselves; ``exp_avg``, ``exp_avg_sq`` and ``other_state`` optimizer state of more
than one element; ``gradients`` buffers that live from step to step.
"""


class Adapter(abc.ABC):
    """Reads and changes which parameters a live engine trains.

    ``REQUIRED`` and ``PER_GROUP`` name the private attributes a flavour relies on; a DeepSpeed without one of them is
    refused when the adapter is built. ``PER_GROUP`` are the lists with one entry per parameter group; a list of that
    length that is in neither of them nor in ``OTHER_LISTS`` is refused too: it would go stale at the first transition.
    ``OTHER_LISTS`` are those only some versions have, and those that have that length by chance.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ()
    PER_GROUP: ClassVar[frozenset[str]] = frozenset()
    OTHER_LISTS: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.wrapper = engine.optimizer
        self._check_attributes()
        self.torch_optimizer: torch.optim.Optimizer = getattr(self.wrapper, "optimizer", self.wrapper)
        self.names: dict[int, str] = {id(p): name for name, p in engine.module.named_parameters()}
        self.params: dict[str, Parameter] = dict(engine.module.named_parameters())
        group = self.process_group()
        self.ranks = Ranks(dist.get_rank(group=group), dist.get_world_size(group=group), group)
        self.hyper = HyperParameters(self.torch_optimizer)
        self._check_unknown_lists()

    # ---- what a flavour provides -------------------------------------------------------------------------------

    @abc.abstractmethod
    def groups(self) -> list[list[str]]:
        """Names of the parameters in each parameter group of the torch optimizer, in buffer order."""

    @abc.abstractmethod
    def holds_gradients(self) -> bool:
        """True if gradients that no ``step()`` has used are held: a transition would lose or misplace them."""

    @abc.abstractmethod
    def regroup(self, plan: GroupPlan, chunk_bytes: int) -> int:
        """Carry out ``plan``; collective. Returns the bytes that crossed ranks, summed over all ranks."""

    @abc.abstractmethod
    def master_tensors(self) -> list[torch.Tensor]:
        """The tensors the torch optimizer updates on this rank; keys of its ``state``."""

    @abc.abstractmethod
    def gradient_buffers(self) -> Iterable[torch.Tensor]:
        """Gradient buffers that live from step to step."""

    def moving_masters(self, plan: GroupPlan) -> list[torch.Tensor]:
        """Masters whose state ``plan`` cuts; none where state hangs on one tensor per parameter."""
        return []

    def held(self, param: Parameter) -> list[torch.Tensor]:
        """The tensors through which this rank holds a parameter; giving one other ``data`` releases what it had."""
        return [param]

    @contextmanager
    def whole(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, ``data`` of these parameters is complete on every rank; to read. Collective."""
        yield

    def overwrite(self, name: str, value: torch.Tensor | None) -> None:
        """Give a frozen parameter the value that the first rank has; collective."""
        param = self.params[name]
        if value is not None:
            param.data.copy_(value)
        dist.broadcast(param.data, self.ranks.global_rank(0), group=self.ranks.group)

    def adopt(self, new: Parameter, old: Parameter) -> None:  # noqa: B027 - most flavours have nothing to do
        """Let DeepSpeed treat ``new``, which takes the place of ``old``, as its own; collective."""

    def weight_tensors(self) -> Iterable[torch.Tensor]:
        """Storage of the model's weights on this rank."""
        return (tensor.data for param in self.params.values() for tensor in self.held(param))

    # ---- what all flavours share -------------------------------------------------------------------------------

    def process_group(self) -> Any:
        """The data-parallel group whose ranks share the optimizer state."""
        return getattr(self.wrapper, "dp_process_group", None) or self.engine.seq_data_parallel_group

    def check(self, plan: GroupPlan) -> None:
        """Refuse ``plan`` before anything has changed.

        Raises:
            UnsupportedStateError: if state it would cut cannot be cut.
        """
        for master in self.moving_masters(plan):
            check_state(master, self.torch_optimizer.state.get(master, {}))

    def exchange(self, new: Mapping[str, Parameter]) -> None:
        """Put other parameters in the place of frozen ones and release what those held; collective."""
        gone: list[torch.Tensor] = []
        known = self.engine.param_names
        for name, param in new.items():
            old = self.params[name]
            self.adopt(param, old)
            setattr(owner(self.engine.module, name), name.rpartition(".")[2], param)
            self.names[id(param)] = self.names.pop(id(old))
            self.params[name] = param
            known[param] = known.pop(old)
            gone += self.held(old)
        self._let_go(gone)

    def _let_go(self, gone: list[torch.Tensor]) -> None:
        """Empty ``gone``; what is frozen and lies in the same storage moves out, or it would pin it."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in gone if tensor.numel()}
        trained = {name for group in self.groups() for name in group}
        for name, param in self.params.items():
            for tensor in self.held(param) if name not in trained else ():
                if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
                    tensor.data = tensor.data.clone()
        for tensor in gone:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def memory(self) -> dict[str, int]:
        """Bytes this rank holds per category (see ``MEMORY_CATEGORIES``), each storage counted once."""
        counter = _StorageCounter()
        total = dict.fromkeys(MEMORY_CATEGORIES, 0)
        for name, layer in frozen_layers(self.engine.module):
            tensors = [*self.held(self.params[name]), *held_beside(layer)]
            total[QUANTIZED] = total.get(QUANTIZED, 0) + sum(counter.new_bytes(t) for t in tensors)
        beside = held_by_quantized(self.engine.module)
        total["weights"] = sum(counter.new_bytes(t) for t in (*self.weight_tensors(), *beside))
        for master in self.master_tensors():
            total["master_weights"] += counter.new_bytes(master)
            for key, value in self.torch_optimizer.state.get(master, {}).items():
                category = key if key in ("exp_avg", "exp_avg_sq") else "other_state"
                # A single element is a step count, or the moment of a rank's shard of a very short parameter.
                if torch.is_tensor(value) and (value.numel() > 1 or category != "other_state"):
                    total[category] += counter.new_bytes(value)
        total["gradients"] = sum(counter.new_bytes(t) for t in self.gradient_buffers())
        return total

    def _check_attributes(self) -> None:
        missing = sorted(name for name in {*self.REQUIRED, *self.PER_GROUP} if not hasattr(self.wrapper, name))
        if missing:
            raise UnsupportedDeepSpeedError(
                f"DeepSpeed {deepspeed.__version__} is not supported: {type(self.wrapper).__name__} lacks "
                f"{', '.join(missing)}"
            )

    def group_count(self) -> int:
        """Length of the lists in ``PER_GROUP``."""
        return len(self.torch_optimizer.param_groups)

    def _check_unknown_lists(self) -> None:
        count = self.group_count()
        if count < 2 or not self.PER_GROUP:
            return  # with a single group any one-element list looks like a per-group one
        known = {*self.REQUIRED, *self.PER_GROUP, *self.OTHER_LISTS}
        unknown = [
            name
            for name, value in vars(self.wrapper).items()
            if isinstance(value, list) and len(value) == count and name not in known
        ]
        if unknown:
            raise UnsupportedDeepSpeedError(
                f"DeepSpeed {deepspeed.__version__} is not supported: {type(self.wrapper).__name__} keeps per-group "
                f"lists this version does not know: {', '.join(unknown)}"
            )


def forget_gradients(params: Iterable[Parameter], attributes: Sequence[str] = ("grad",)) -> None:
    """Drop gradients of parameters that no longer train; engines never look at them again."""
    for param in params:
        for name in attributes:
            if getattr(param, name, None) is not None:
                setattr(param, name, None)


def unlink(params: Iterable[Parameter]) -> None:
    """Remove DeepSpeed's high-precision links from parameters that no longer have a master.

    ``safe_get_full_*`` then answers None for them, as it does for parameters that never trained, instead of zeros.
    """
    names = ("_hp_mapping", "get_full_hp_param", "get_full_hp_grad", "set_full_hp_param", "set_full_hp_grad")
    for param in params:
        for name in (*names, "_hp_grad"):
            if name in vars(param):
                delattr(param, name)


class _StorageCounter:
    """Counts each storage once, however many views of it there are."""

    def __init__(self) -> None:
        self._seen: set[tuple[torch.device, int]] = set()

    def new_bytes(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if storage.nbytes() == 0 or key in self._seen:
            return 0
        self._seen.add(key)
        return storage.nbytes()
