"""Owns finding embeddings, blocks and head of a model by structure. May import torch; no deepspeed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from progtuning_ds.blocks.block_map import BlockMap
from progtuning_ds.blocks.forward_order import loops_over, uses_after
from progtuning_ds.blocks.parameters import full_numel, full_shape
from progtuning_ds.errors import BlockDiscoveryError, did_you_mean

# A second stack of at least this share of the largest one's parameters makes the choice ambiguous.
_RIVAL_SHARE = 0.1

_EMBEDDINGS = "embeddings"
_HEAD = "head"


@dataclass(frozen=True, slots=True)
class _Stack:
    """A module list of blocks; `offset` is the index of its first block in the whole model."""

    path: str
    module: nn.ModuleList | nn.Sequential
    offset: int = 0

    @property
    def top(self) -> int:
        return self.offset + len(self.module) - 1


def discover_blocks(model: nn.Module, *, path: str | None = None) -> BlockMap:
    """Find the embeddings, blocks and head of a model by its structure.

    The blocks are the children of the largest module list whose children share parameters of the same name and shape.
    Everything else belongs to the embeddings when forward uses it before or between the blocks, and to the head when
    it uses it after them; the order is read from the source of `forward`, and nothing is run. A tied weight belongs
    to the embeddings when one of its places does. Encoder-decoders have two stacks; the encoder's blocks come first,
    and what is between the stacks (such as the encoder's final norm) freezes with the encoder's top block.

    Args:
        model: a bare module, on any device (meta included), also wrapped by PEFT or partitioned by ZeRO-3.
        path: dotted path of the module list to use instead of searching; two joined by `+` for encoder-decoders.

    Returns:
        The map of all parameters. Those that do not require grad now are recorded as `frozen` and never train.

    Raises:
        BlockDiscoveryError: if there is no such stack or no clear choice, if blocks share weights, or if `path` is
            no module list of the model.
    """
    stacks = _explicit_stacks(model, path) if path is not None else _find_stacks(model)
    _refuse_repeated_blocks(model, stacks)
    places: list[tuple[str, str | int]] = []
    _place(model, "", stacks, stacks[-1], places)
    return _assign(model, stacks, places)


def _find_stacks(model: nn.Module) -> list[_Stack]:
    """Return the one stack of the model, or the two of an encoder-decoder with the encoder's first."""
    candidates: list[tuple[int, str, nn.ModuleList]] = []
    for path, module in _module_lists(model).items():
        nested = any(path.startswith(f"{outer}.") for _, outer, _ in candidates)
        if not nested and isinstance(module, nn.ModuleList) and _is_stack(module):
            candidates.append((sum(map(full_numel, module.parameters())), path, module))
    if not candidates:
        raise BlockDiscoveryError(
            f"{type(model).__name__} has no stack of similar blocks (an nn.ModuleList), so nothing can freeze block "
            f"by block; name one as blocks path"
        )
    largest = max(candidates, key=lambda candidate: candidate[0])
    main = [c for c in candidates if c is largest or c[0] >= _RIVAL_SHARE * largest[0]]
    if len(main) == 1:
        return [_Stack(main[0][1], main[0][2])]
    if len(main) == 2 and _is_encoder_decoder(model):
        encoder = set(cast(Any, model).get_encoder().modules())
        main.sort(key=lambda candidate: candidate[2] not in encoder)
        if main[0][2] in encoder and main[1][2] not in encoder:
            return _offsets([(path, module) for _, path, module in main])
    raise BlockDiscoveryError(
        f"{type(model).__name__} has several block stacks: {', '.join(c[1] for c in main)}; name one as blocks path"
    )


def _explicit_stacks(model: nn.Module, path: str) -> list[_Stack]:
    lists = _module_lists(model)
    for single in path.split("+"):
        if single not in lists:
            known = [name for name, module in lists.items() if _is_stack(module)] or list(lists)
            raise BlockDiscoveryError(
                f"blocks path must be a module list of {type(model).__name__}, got {single!r}; "
                f"allowed: {', '.join(known[:6]) or 'none'}{did_you_mean(single, known)}"
            )
    stacks = _offsets([(single, lists[single]) for single in path.split("+")])
    for stack in stacks:
        if any(other is not stack and f"{stack.path}.".startswith(f"{other.path}.") for other in stacks):
            raise BlockDiscoveryError(f"blocks path must name separate module lists, got {path!r}")
    return stacks


def _offsets(found: Sequence[tuple[str, nn.ModuleList | nn.Sequential]]) -> list[_Stack]:
    stacks: list[_Stack] = []
    for path, module in found:
        stacks.append(_Stack(path, module, stacks[-1].top + 1 if stacks else 0))
    return stacks


def _module_lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Return the module lists and sequences that own parameters, by path, outer ones first."""
    return {
        path: module
        for path, module in model.named_modules()
        if path and isinstance(module, (nn.ModuleList, nn.Sequential)) and any(True for _ in module.parameters())
    }


def _is_stack(module: nn.ModuleList | nn.Sequential) -> bool:
    """Whether all children are modules with parameters that have at least one name and shape in common."""
    common: set[tuple[str, tuple[int, ...]]] | None = None
    for block in module:
        if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
            return False
        own = {(name, full_shape(parameter)) for name, parameter in block.named_parameters()}
        common = own if common is None else common & own
    return bool(common)


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and hasattr(model, "get_encoder")


def _refuse_repeated_blocks(model: nn.Module, stacks: Sequence[_Stack]) -> None:
    """Refuse a model that runs its blocks several times (ALBERT): they cannot freeze one by one.

    A loop over the list itself runs each block once, whatever the config says: a cut model's config may be stale, and
    a decoder alone may come with the config of an encoder-decoder.
    """
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for stack in stacks:
        parent, _, name = stack.path.rpartition(".")
        count = len(stack.module)
        if isinstance(layers, int) and layers > count and not loops_over(model.get_submodule(parent), name):
            raise BlockDiscoveryError(
                f"{type(model).__name__} runs {layers} layers through the {count} block{'s' * (count > 1)} of "
                f"{stack.path}: layers that share weights cannot freeze one by one"
            )


def _place(
    module: nn.Module, prefix: str, stacks: Sequence[_Stack], last: _Stack, places: list[tuple[str, str | int]]
) -> None:
    """Add to `places` the component of every child of `module` that no stack is in, and descend into the others."""
    inside: dict[str, list[_Stack]] = {}
    for stack in stacks:
        inside.setdefault(stack.path.removeprefix(prefix).partition(".")[0], []).append(stack)
    order = {child: uses_after(module, child) for child in inside}
    names = [*module._modules, *module._parameters]
    for name in names:
        full = f"{prefix}{name}"
        if name not in inside:
            component: str | int = _EMBEDDINGS
            for child, within in inside.items():
                if _comes_after(module, name, child, order[child], names):
                    component = _HEAD if last in within else within[-1].top
            places.append((full, component))
        elif any(stack.path == full for stack in inside[name]):
            stack = inside[name][0]
            places.extend((f"{full}.{key}", stack.offset + i) for i, key in enumerate(stack.module._modules))
        else:
            _place(module.get_submodule(name), f"{full}.", inside[name], last, places)


def _comes_after(module: nn.Module, name: str, child: str, order: dict[str, bool], names: Sequence[str]) -> bool:
    """Whether `name` runs after `child`; what forward does not mention goes by its kind, then by registration."""
    if name in order:
        return order[name]
    sibling = module._modules.get(name)
    if sibling is None or any(isinstance(m, nn.Embedding) for m in sibling.modules()):
        return False
    return names.index(name) > names.index(child)


def _assign(model: nn.Module, stacks: Sequence[_Stack], places: list[tuple[str, str | int]]) -> BlockMap:
    """Give every parameter one component; of a tied weight's places, the lowest counts."""
    component_of_place = dict(places)
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    found: dict[str, set[str | int]] = {name: set() for name, _ in model.named_parameters()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        place = alias
        while place not in component_of_place:
            place = place.rpartition(".")[0]
        found[names[id(parameter)]].add(component_of_place[place])
    members: dict[str | int, list[str]] = {}
    for name, components in found.items():
        blocks = sorted(c for c in components if isinstance(c, int))
        if len(blocks) > 1 and _EMBEDDINGS not in components:
            raise BlockDiscoveryError(
                f"blocks {blocks[0]} and {blocks[1]} of {type(model).__name__} share the weight {name}: "
                f"blocks that share weights cannot freeze one by one"
            )
        lowest = _EMBEDDINGS if _EMBEDDINGS in components else blocks[0] if blocks else _HEAD
        members.setdefault(lowest, []).append(name)
    return BlockMap(
        path="+".join(stack.path for stack in stacks),
        embeddings=tuple(members.get(_EMBEDDINGS, ())),
        blocks=tuple(tuple(members.get(index, ())) for index in range(stacks[-1].top + 1)),
        head=tuple(members.get(_HEAD, ())),
        order=tuple(found),
        frozen=frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad),
    )
