"""Owns the shape of a Transformer as its activations depend on it. Standard library and errors only."""

from __future__ import annotations

from dataclasses import dataclass

from progtuning_ds.errors import ConfigError, require_choice

ATTENTIONS = ("eager", "sdpa", "flash")
NORMS = ("layernorm", "rmsnorm")
# How many tensors as wide as the MLP an activation keeps for backward, the input of the last linear layer included.
MLPS = {"gelu": 2, "gelu_composed": 5, "gated": 4}


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a stack of equal Transformer blocks looks like; every size in elements.

    Attributes:
        num_blocks: blocks of the stack.
        hidden: width of the residual stream.
        heads: query heads.
        head_dim: width of a head.
        kv_heads: key and value heads (grouped-query attention has fewer than `heads`).
        intermediate: width inside the MLP.
        vocab: classes of a language-model head, 0 for a model without one.
        norm: `layernorm`, or `rmsnorm` as transformers writes it (in fp32, in separate operations).
        norm_first: norms stand before attention and MLP (GPT-2, Llama), not behind them (BERT).
        mlp: `gelu` (one fused operation), `gelu_composed` (GPT-2's tanh formula, operation by operation) or `gated`.
        softmax_fp32: eager attention computes its softmax in fp32 and keeps that beside the bit16 copy.
        attention_dropout: dropout on attention weights is on.
        hidden_dropout: dropout on the residual stream is on.
        embedding_norm: the embeddings end in a norm.
    """

    num_blocks: int
    hidden: int
    heads: int
    head_dim: int
    kv_heads: int
    intermediate: int
    vocab: int = 0
    norm: str = "layernorm"
    norm_first: bool = False
    mlp: str = "gelu"
    softmax_fp32: bool = False
    attention_dropout: bool = False
    hidden_dropout: bool = False
    embedding_norm: bool = False

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, NORMS)
        require_choice("mlp", self.mlp, MLPS)
        for name in ("num_blocks", "hidden", "heads", "head_dim", "kv_heads", "intermediate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {getattr(self, name)!r}")
        if self.vocab < 0:
            raise ConfigError(f"vocab must not be negative, got {self.vocab!r}")
