"""What embeddings and head are, found by running the model: independent of how discovery finds them.

Three questions are put to real forwards and backwards: which modules run before and after the blocks, what depends on
the output of a block, and what still gets a gradient when the output of a block is cut off.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from tests.blocks.families import inputs_of


def canonical_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}


def owners_outside(model: nn.Module, stacks: Sequence[nn.ModuleList]) -> dict[nn.Module, list[str]]:
    """Modules outside the stacks that own parameters themselves, with the canonical names of these."""
    inside = {module for stack in stacks for module in stack.modules()}
    names = canonical_names(model)
    return {
        module: [names[id(parameter)] for parameter in module.parameters(recurse=False)]
        for module in model.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    }


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def call_positions(model: nn.Module, modules: Sequence[nn.Module]) -> dict[nn.Module, int]:
    """Run the model and return when each of `modules` was first entered."""
    positions: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any) -> None:
        positions.setdefault(module, len(positions))

    with _hooks([module.register_forward_pre_hook(note) for module in modules]), torch.no_grad():
        model(**inputs_of(model))
    return positions


def modules_depending_on(model: nn.Module, block: nn.Module, modules: Sequence[nn.Module]) -> set[nn.Module]:
    """Run with only `block` trainable; return the modules whose first input requires grad because of it."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in block.parameters():
        parameter.requires_grad_(True)
    seen: dict[nn.Module, bool] = {}

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        seen.setdefault(module, any(tensor.requires_grad for tensor in tensors))

    with _hooks([m.register_forward_pre_hook(look, with_kwargs=True) for m in modules]):
        model(**inputs_of(model))
    return {module for module, depends in seen.items() if depends}


def names_with_gradient(model: nn.Module, cut: nn.Module | None = None) -> set[str]:
    """Run forward and backward with everything trainable, with the output of `cut` detached; return who has a grad."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None

    def detach(_: nn.Module, __: Any, output: Any) -> Any:
        return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, output)

    with _hooks([cut.register_forward_hook(detach)] if cut is not None else []):
        output = model(**inputs_of(model))
    sum(score.square().sum() for key, score in output.items() if "logits" in key).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}
