"""Closed formulas for what a forward pass keeps for backward, tensor by tensor. Standard library only.

What is counted is what autograd saves in transformers' own modules, each storage once; a frozen block that backward
passes through keeps less than one that trains (a linear layer saves its input for the gradient of its weight only),
and a block below the lowest trained parameter keeps nothing. ``tests/memory`` compares with saved-tensor hooks.
The unit throughout is bytes per token; one sequence has ``seq_len`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from progtuning_ds.errors import require_choice
from progtuning_ds.memory.architecture import ATTENTIONS, MLPS, Architecture

FP32 = 4
DEVICES = ("cuda", "cpu")
_ID = 8  # a token's id or label, int64


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes per token: kept wherever gradients pass, and in addition where the weights train."""

    always: float = 0.0
    with_weights: float = 0.0

    @property
    def trained(self) -> float:
        """Bytes per token where the weights train."""
        return self.always + self.with_weights

    def __add__(self, other: Kept) -> Kept:
        """Sum both parts."""
        return Kept(self.always + other.always, self.with_weights + other.with_weights)


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """What one token costs, in bytes.

    Attributes:
        embeddings: kept above the embedding tables.
        block: kept by one block.
        head: kept behind the last block, logits not included.
        logits: kept of a language model's logits.
        block_input: the residual stream, all that a checkpointed block keeps.
        workspace: live for a moment in a block's backward, beside what is kept.
        logits_workspace: live for a moment in the loss and its backward, beside what is kept.
    """

    embeddings: Kept
    block: Kept
    head: Kept
    logits: float
    block_input: float
    workspace: float
    logits_workspace: float


def token_costs(
    shape: Architecture, seq_len: int, *, attention: str = "sdpa", element: int = 2, device: str = "cuda"
) -> TokenCosts:
    """Work out the costs of one token.

    Args:
        shape: the model.
        seq_len: tokens of a sequence; attention that keeps its weights costs in proportion to it.
        attention: ``eager`` keeps attention weights; ``sdpa`` and ``flash`` do not where a fused kernel exists, which
            on the CPU there is none of with dropout.
        element: bytes of an activation: 2 in bf16 and fp16, 4 in fp32.
        device: ``cuda`` keeps a dropout mask of one byte, ``cpu`` one as wide as the activation.
    """
    require_choice("attention", attention, ATTENTIONS)
    require_choice("device", device, DEVICES)
    make = _Tensors(shape, seq_len, attention, element, device)
    norm, mlp = make.norm(), make.mlp()
    block = norm + norm + make.attention() + mlp + Kept(2 * make.dropout())
    embeddings = Kept(make.dropout() + _ID)
    if shape.embedding_norm:
        embeddings += norm
    stream = element * shape.hidden
    # A model whose norms stand behind its blocks hands the last one's output, counted there, to the head.
    last = norm if shape.norm_first else Kept()
    return TokenCosts(
        embeddings=embeddings,
        block=block,
        head=last,
        logits=FP32 * shape.vocab + _ID if shape.vocab else 0.0,
        block_input=stream,
        workspace=make.workspace(),
        # Gradient of the loss with respect to log-probabilities, then to logits, both in fp32.
        logits_workspace=2.0 * FP32 * shape.vocab,
    )


@dataclass(frozen=True, slots=True)
class _Tensors:
    shape: Architecture
    seq_len: int
    kind: str
    element: int
    device: str

    @property
    def query(self) -> int:
        """Bytes of all query heads."""
        return self.element * self.shape.heads * self.shape.head_dim

    @property
    def is_fused(self) -> bool:
        return self.kind != "eager" and not (self.device == "cpu" and self.shape.attention_dropout)

    def mask(self, element: int) -> int:
        """Bytes that dropout keeps of one element."""
        return element if self.device == "cpu" else 1

    def dropout(self) -> float:
        return self.mask(self.element) * self.shape.hidden if self.shape.hidden_dropout else 0.0

    def norm(self) -> Kept:
        stream, statistic = self.element * self.shape.hidden, self.element if self.device == "cpu" else FP32
        if self.shape.norm == "layernorm":
            return Kept(stream + 2 * statistic, stream)
        # The input in fp32 and 1/rms; for the weight's gradient the normalised input; the next layer's input.
        return Kept(FP32 * self.shape.hidden + FP32, 2 * stream)

    def attention(self) -> Kept:
        shape = self.shape
        if self.is_fused:
            # Flash kernels read grouped heads as they are; sdpa is given them repeated, and a mask of its own dtype.
            key = self.element * shape.kv_heads * shape.head_dim if self.kind == "flash" else self.query
            mask = self.element * self.seq_len if self.kind == "sdpa" else 0
            return Kept(self.query + 2 * key + self.query + FP32 * shape.heads + mask)
        # Without a fused kernel sdpa computes in fp32.
        inside = FP32 if self.kind != "eager" else self.element
        weights = shape.heads * self.seq_len
        kept = inside * weights
        if self.kind == "eager" and shape.softmax_fp32 and inside < FP32:
            kept += FP32 * weights
        if shape.attention_dropout:
            kept += (self.mask(inside) + inside) * weights
        return Kept(3 * self.query * inside / self.element + kept, self.query)

    def mlp(self) -> Kept:
        wide = self.element * self.shape.intermediate
        return Kept((MLPS[self.shape.mlp] - 1) * wide, wide)

    def workspace(self) -> float:
        """What the last block's MLP computes first in backward: by then attention's own gradients are far off."""
        return self.element * (self.shape.intermediate + 2 * self.shape.hidden)
