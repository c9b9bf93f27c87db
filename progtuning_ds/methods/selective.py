"""BitFit and LayerNorm tuning: parameters of the base, chosen by kind. May import torch; no deepspeed."""

from __future__ import annotations

from torch import nn


def biases(model: nn.Module) -> list[str]:
    """Names of all bias terms (BitFit, arXiv 2106.10199), norms' included."""
    return [name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]


def norms(model: nn.Module) -> list[str]:
    """Names of the weights and biases of all normalization layers (arXiv 2312.11420)."""
    inside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
        for parameter in module.parameters(recurse=False)
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]
