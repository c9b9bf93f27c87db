"""How long a sequence may be. Imports transformers; no torch, no deepspeed."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from progtuning_ds.errors import ConfigError


def usual_length(wanted: int | None, usual: int, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> int:
    """Return `wanted`, checked as by `length_limit`, or where it is None the usual length or what the model reads."""
    limit = length_limit(wanted, tokenizer, max_positions)
    if wanted is not None:
        return wanted
    return usual if limit is None else min(usual, limit)


def length_limit(wanted: int | None, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> int | None:
    """Return the tokens after which a text is cut: what was asked for, or the longest that the model reads.

    Args:
        wanted: `task.max_length`.
        tokenizer: may have a limit of its own.
        max_positions: the model's limit, if it has one.

    Raises:
        ConfigError: if more is wanted than the model reads, or so little that no word fits.
    """
    # A tokenizer without a limit says 1e30.
    limits = [limit for limit in (tokenizer.model_max_length, max_positions) if limit and limit < 10**9]
    longest = min(limits, default=None)
    if wanted is None:
        return longest
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if wanted <= special:
        raise ConfigError(f"task.max_length must be above {special} (the tokenizer's own tokens), got {wanted}")
    if longest is not None and wanted > longest:
        raise ConfigError(f"task.max_length must be at most {longest}, the longest the model reads, got {wanted}")
    return wanted
