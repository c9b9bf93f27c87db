"""Which modules of a model are the head that a task brings. May import torch and transformers; no deepspeed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules beside the base model that a task adds, such as ``classifier``, ``score``, ``qa_outputs``.

    The output layer of a language model is pretrained and often tied to the embeddings, so it is none of them.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    base = _base_modules(model)
    return [
        name
        for name, child in model.named_children()
        if child not in base and _has_parameters(child) and not _contains(child, output)
    ]


def _base_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The children that make up the base model: one of them, all, or several (T5 has its stacks beside its head)."""
    base = getattr(model, model.base_model_prefix, None)
    if isinstance(base, nn.Module):
        return [base]
    bare: Any = MODEL_MAPPING.get(type(model.config), ())  # a class, or several
    if isinstance(model, bare):
        return list(model.children())
    embeddings = model.get_input_embeddings()
    return [child for child in model.children() if _contains(child, embeddings) or _has_stack(child)]


def _has_stack(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.ModuleList) and len(inner) > 1 for inner in module.modules())


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _contains(module: nn.Module, other: nn.Module | None) -> bool:
    return other is not None and any(inner is other for inner in module.modules())
