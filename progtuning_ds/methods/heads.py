"""Which modules of a model are the head that a task brings. May import torch and transformers; no deepspeed."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules beside the base model that a task adds, such as ``classifier``, ``score``, ``qa_outputs``.

    The output layer of a language model is pretrained and often tied to the embeddings, so it is none of them.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    base = getattr(model, model.base_model_prefix, None)
    return [
        name
        for name, child in model.named_children()
        if child is not base and _has_parameters(child) and not _contains(child, output)
    ]


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _contains(module: nn.Module, other: nn.Module | None) -> bool:
    return other is not None and any(inner is other for inner in module.modules())
