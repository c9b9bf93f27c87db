"""Proves on the live model that packed documents do not see each other. Imports torch; no deepspeed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from progtuning_ds.errors import ConfigError

_TOKENS = 6


def check_no_leak(model: nn.Module, input_ids: Tensor) -> None:
    """Raise a ConfigError if a packed document sees the one before it. Collective where a forward pass is.

    Models of transformers keep documents apart by position ids that begin again, if they build their mask by its own
    functions; one that does not would learn across documents without a word.

    Args:
        model: the engine or the bare module; its training mode is restored.
        input_ids: token ids to try with, [rows, length].
    """
    words = int(input_ids.max()) + 1
    first = input_ids.flatten()[:1] * 0 + torch.arange(_TOKENS, device=input_ids.device) % words
    other = (first + 1) % words
    second = first.flip(0)
    positions = torch.arange(_TOKENS, device=input_ids.device).repeat(2).unsqueeze(0)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        behind = [
            model(input_ids=torch.cat([before, second]).unsqueeze(0), position_ids=positions, use_cache=False).logits
            for before in (first, other)
        ]
    model.train(was_training)
    apart = (behind[0][0, _TOKENS:].float() - behind[1][0, _TOKENS:].float()).abs().max()
    moved = (behind[0][0, :_TOKENS].float() - behind[1][0, :_TOKENS].float()).abs().max()
    if float(apart) > 1e-3 * max(float(moved), 1e-6):
        raise ConfigError(
            "task.packing: this model lets packed documents see each other (its attention ignores where positions "
            "begin again); set task.packing=false"
        )
