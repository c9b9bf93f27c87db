"""A linear layer whose weight is quantized because it will never train again. May import torch; no deepspeed.

The layer is changed in place and keeps its hooks: ZeRO-3 gathers weights in them. NF4 is stored and read by
bitsandbytes' functions. Its layers are not used: `Linear8bitLt` also rounds activations and keeps the whole weight on
every ZeRO-3 rank, `Linear4bit` keeps it from forward to backward. Here nothing but the weight is rounded, so what
`dense_weight` returns is what the model computes with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from progtuning_ds.blocks import BlockMap, full_shape
from progtuning_ds.errors import UnsupportedStateError
from progtuning_ds.methods.layers import users_of
from progtuning_ds.on_freeze import NF4_BLOCK

_TABLES: dict[tuple[str, int], torch.Tensor] = {}


@dataclass
class Origin:
    """What a layer was before it was quantized.

    Attributes:
        kind: "int8" or "nf4".
        layer: its class, `nn.Linear` or GPT-2's `Conv1D`.
        shape: of its weight.
        dtype: of its weight.
    """

    kind: str
    layer: type[nn.Module]
    shape: torch.Size
    dtype: torch.dtype

    @property
    def transposed(self) -> bool:
        """Whether the weight is [inputs, outputs]."""
        return self.layer is not nn.Linear


class FrozenLinear(nn.Linear):
    """``y = x @ W.T + b`` with a quantized W; made of another layer by `quantize`, never constructed.

    The parameter named ``weight`` holds the codes, uint8 [ceil(n / 2), 1] (nf4) or int8 [outputs, inputs], and does
    not require grad.

    Attributes:
        origin: what it was.
        scales: what else it takes to read the codes.
    """

    origin: Origin
    scales: Any

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """What the layer computes with, made anew; empty while ZeRO-3 has it partitioned, as a dense one is.

        Some blocks read the weight themselves (Mamba to multiply by it, LongT5 its dtype) and must not find codes.
        """
        codes = _codes_of(self)
        if codes.is_floating_point():  # not exchanged yet
            return codes
        return dense_weight(self) if codes.numel() else torch.empty(0, dtype=self.origin.dtype, device=codes.device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., outputs] in the dtype of ``input`` [..., inputs], or of autocast where that is on."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        return _FrozenLinear.apply(input, self.bias, self)  # type: ignore[no-any-return]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedStateError(
            f"a weight quantized to {self.origin.kind} when its block froze has no place in a state dict; call "
            f"stages.compression.expand() before, which makes it dense again"
        )

    def extra_repr(self) -> str:
        """As the layer says it, and how it is stored."""
        return f"{super().extra_repr()}, {self.origin.kind}"


class _FrozenLinear(torch.autograd.Function):
    """Reads the weight twice and keeps none of it in between; ZeRO-3 gathers it for both."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, layer: FrozenLinear) -> torch.Tensor:
        ctx.layer = layer
        # Not torch.nn.functional.linear, which ZeRO-3 replaces by one that keeps what it gets for backward.
        like = None if bias is None else bias.to(input.dtype)
        return torch.ops.aten.linear(input, _matrix(layer).to(input.dtype), like)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (gradient,), layer = gradients, ctx.layer
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = gradient @ _matrix(layer).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.sum(tuple(range(gradient.dim() - 1))).to(layer.bias.dtype)
        return of_input, of_bias, None


def freezable(model: nn.Module, blocks: BlockMap) -> dict[str, tuple[int, int]]:
    """Names of the weights in blocks that can be quantized once frozen, with (outputs, inputs).

    They are those of linear layers that nothing else uses and that the model does not want in fp32. What did not
    require grad at discovery belongs to a base that trains by a method, and is left alone.
    """
    inside = {name for block in blocks.blocks for name in block} - blocks.frozen
    users = users_of(model)
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    found: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if not is_plain_linear(module) or name not in inside or exact & set(path.split(".")):
            continue
        if len(users[id(module.weight)]) == 1:
            found[name] = outputs_and_inputs(module)
    return found


def outputs_and_inputs(module: nn.Module) -> tuple[int, int]:
    """Of a plain linear layer, whole under ZeRO-3 too; GPT-2's has its weight the other way round."""
    rows, columns = full_shape(module.weight)  # type: ignore[arg-type]
    return (rows, columns) if type(module) is nn.Linear else (columns, rows)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else."""
    # Exactly: a subclass may compute anything.
    return type(module) is nn.Linear or (
        type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    )


@torch.no_grad()
def quantize(layer: nn.Module, weight: torch.Tensor, kind: str) -> nn.Parameter:
    """Make ``layer`` a `FrozenLinear` in place; the caller puts the returned codes into ``layer.weight``.

    Args:
        layer: `nn.Linear` or `Conv1D`.
        weight: its whole weight, floating; not kept.
        kind: "int8" or "nf4".
    """
    origin = Origin(kind, type(layer), weight.shape, weight.dtype)
    matrix = (weight.t() if origin.transposed else weight).contiguous()
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        codes, found = quantize_4bit(
            _in_blocks(matrix), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        scales: Any = found
        scales.code, scales.state2.code = _shared(scales.code), _shared(scales.state2.code)
    else:
        wide = matrix.float()
        scales = wide.abs().amax(dim=1, keepdim=True) / 127
        codes = (wide / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    changed: Any = layer
    changed.__class__ = FrozenLinear
    changed.origin, changed.scales = origin, scales
    changed.out_features, changed.in_features = matrix.shape
    return _codes(codes, origin)


def restore(layer: FrozenLinear, weight: torch.Tensor) -> nn.Parameter:
    """Make a layer what it was, in place; the caller puts the returned parameter into ``layer.weight``."""
    origin = layer.origin
    assert weight.shape == origin.shape, (weight.shape, origin.shape)
    dense = nn.Parameter(weight.to(origin.dtype), requires_grad=False)
    changed: Any = layer
    changed.__class__ = origin.layer
    del changed.origin, changed.scales
    return dense


@torch.no_grad()
def dense_weight(layer: FrozenLinear) -> torch.Tensor:
    """The weight that the layer computes with, in the shape and dtype it had; needs the whole codes."""
    matrix = _matrix(layer).to(layer.origin.dtype)
    return matrix.t().contiguous() if layer.origin.transposed else matrix


def scales_of(layer: FrozenLinear) -> dict[str, torch.Tensor]:
    """The tensors beside the codes, by a name that is part of the checkpoint format."""
    if layer.origin.kind == "int8":
        return {"scales": layer.scales}
    inner = layer.scales.state2
    return {"scales": layer.scales.absmax, "scales_scales": inner.absmax, "scales_mean": layer.scales.offset}


def held_beside(layer: FrozenLinear) -> list[torch.Tensor]:
    """Every tensor that the layer holds beside its codes, tables included."""
    tables = [] if layer.origin.kind == "int8" else [layer.scales.code, layer.scales.state2.code]
    return [*scales_of(layer).values(), *tables]


def frozen_layers(model: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    """``(name of the weight, layer)`` of every quantized layer, in model order."""
    for path, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            yield f"{path}.weight", module


def _matrix(layer: FrozenLinear) -> torch.Tensor:
    """The weight [outputs, inputs]: in its own dtype (nf4), or in fp32 (int8)."""
    codes = _codes_of(layer).data
    if layer.origin.kind == "int8":
        return codes * layer.scales  # in fp32, and no copy of the codes in it
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(codes.view(-1, 1), layer.scales).view(layer.out_features, layer.in_features)


def _codes_of(layer: FrozenLinear) -> torch.Tensor:
    """The parameter itself; DeepSpeed gathers it on the way where it should."""
    return layer._parameters["weight"]  # type: ignore[return-value]


def _in_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """The elements of a matrix, a block a row where that comes out even.

    On the CPU, bitsandbytes 0.50 gives blocks wrong scales where they go beyond the end of a row
    (``backends/cpu/ops.py``, ``dequantize_4bit``, of [32, 32] for instance).
    """
    return matrix.view(-1, NF4_BLOCK) if matrix.numel() % NF4_BLOCK == 0 else matrix.view(-1)


def _shared(table: torch.Tensor) -> torch.Tensor:
    """One tensor for all layers: bitsandbytes makes these constants anew, a kilobyte, for every weight."""
    return _TABLES.setdefault((str(table.device), table.numel()), table)


def _codes(codes: torch.Tensor, origin: Origin) -> nn.Parameter:
    parameter = nn.Parameter(codes, requires_grad=False)
    parameter.dense_shape = tuple(origin.shape)  # type: ignore[attr-defined] # what `full_shape` tells
    return parameter


def owner(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the parameter of this name."""
    return model.get_submodule(name.rpartition(".")[0])
