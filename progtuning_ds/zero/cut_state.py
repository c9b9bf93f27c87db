"""How the optimizer state of one master is cut and moved with it, state in 8-bit blocks included.

8-bit state is one code per element and one scale per block of 256 (Dettmers et al., arXiv 2110.02861): bitsandbytes'
``state1`` with ``absmax1``, and `progtuning_ds.MaskedAdamW`'s ``exp_avg`` with ``absmax``. A cut moves block
boundaries, so elements travel with the scale they had, and blocks are formed anew where they arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from progtuning_kernels import STATE_BLOCK
from progtuning_kernels.quantization import dynamic_map, encode

from progtuning_ds.errors import UnsupportedStateError

_BLOCKS_AT_ONCE = 4096

Cut = Callable[[torch.Tensor], list[torch.Tensor]]
"""Takes a tensor laid out like the master apart as the master is taken apart; consumes it."""

BLOCK_SCALES = {"state1": "absmax1", "state2": "absmax2", "exp_avg": "absmax", "exp_avg_sq": "absmax_sq"}
"""Key of the codes: key of their scales."""
BLOCK_TABLES = {"state1": "qmap1", "state2": "qmap2"}
"""Key of the codes: key of what they stand for, where the state says it."""


def check_state(master: torch.Tensor, state: Mapping[str, Any]) -> None:
    """Refuse state that cannot be cut, before anything has changed.

    Raises:
        UnsupportedStateError: for a state tensor that is neither laid out like ``master`` nor in known 8-bit blocks.
    """
    _split(master, state)
    for key in blockwise_keys(state):
        is_signed(key, state)


def cut_state(master: torch.Tensor, state: dict[str, Any], cut: Cut, parts: int) -> list[dict[str, Any]]:
    """The state of each of the ``parts`` that ``cut`` makes of ``master``. Consumes ``state``.

    State as wide as its master moves to the bit. In 8-bit state, a block whose elements all had one scale (as every
    block that was not cut) keeps codes and scale to the bit. The others are decoded and encoded anew, which moves an
    element by at most half a step of the map: 0.0071 of the largest in its block for the signed map, 0.0036 for the
    unsigned. Beside codes and master, 4 bytes an element are held while one kind of state moves.
    """
    if not state:
        return [{} for _ in range(parts)]
    moving, staying = _split(master, state)
    new = [{key: _own(value) for key, value in staying.items()} for _ in range(parts)]
    blockwise = blockwise_keys(state)
    signed = {key: is_signed(key, state) for key in blockwise}
    scales = {key: state[BLOCK_SCALES[key]] for key in blockwise}
    state.clear()
    for key in sorted(moving):  # every rank has the same kinds, and they move in step
        tensor = _unpaged(moving.pop(key), master)
        if key not in blockwise:
            for part, piece in zip(new, cut(tensor), strict=True):
                part[key] = piece
            continue
        spread = scales.pop(key).repeat_interleave(STATE_BLOCK)[: tensor.numel()]
        for part, codes, own in zip(new, cut(tensor), cut(spread), strict=True):
            part[key] = codes
            part[BLOCK_SCALES[key]] = block_again(codes, own, signed[key])
    return new


def _split(master: torch.Tensor, state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Sort state into tensors laid out like ``master`` (they move) and per-tensor values (they stay)."""
    blockwise = blockwise_keys(state)
    scales = {BLOCK_SCALES[key] for key in blockwise}
    tables = {BLOCK_TABLES[key] for key in blockwise if key in BLOCK_TABLES}
    moving: dict[str, torch.Tensor] = {}
    staying: dict[str, Any] = {}
    for key, value in state.items():
        if key in scales:
            continue
        if torch.is_tensor(value) and key not in tables and (value.numel() > 1 or key in blockwise):
            if value.shape != master.shape:
                raise UnsupportedStateError(
                    f"optimizer state {key!r} of shape {tuple(value.shape)} cannot be re-partitioned with a master of "
                    f"shape {tuple(master.shape)}; plan boundaries with progtuning_ds.param_groups, which move nothing"
                )
            moving[key] = value
        else:
            staying[key] = value
    return moving, staying


def blockwise_keys(state: Mapping[str, Any]) -> frozenset[str]:
    """Keys of the codes in ``state``."""
    return frozenset(
        key
        for key, scales in BLOCK_SCALES.items()
        if torch.is_tensor(state.get(key)) and state[key].dtype == torch.uint8 and torch.is_tensor(state.get(scales))
    )


def is_signed(key: str, state: Mapping[str, Any]) -> bool:
    """Whether the map of the codes ``key`` has negative values; raises UnsupportedStateError for an unknown map."""
    table = state.get(BLOCK_TABLES.get(key, ""))
    if table is None:
        return key == "exp_avg"
    signed = bool(table[0] < 0)
    known = dynamic_map(signed)
    if table.shape != known.shape or not torch.allclose(table.detach().cpu(), known, rtol=0, atol=1e-6):
        raise UnsupportedStateError(
            f"optimizer state {key!r} is in a quantization map this version does not know and cannot be re-blocked; "
            f"plan boundaries with progtuning_ds.param_groups, which move nothing"
        )
    return signed


def block_again(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """Form blocks of ``codes`` (uint8 [n], changed in place) that had ``scales`` (fp32 [n]); returns their new scales.

    A scale of zero says that the element is zero, whatever its code.
    """
    blocks = torch.nn.functional.pad(scales, (0, -scales.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)
    largest = blocks.amax(dim=1)
    table = dynamic_map(signed, codes.device)
    nothing = (scales == 0) & (largest.repeat_interleave(STATE_BLOCK)[: codes.numel()] > 0)
    codes.masked_fill_(nothing, int((table == 0).nonzero()[0]))
    mixed = ((blocks != largest[:, None]) & (blocks != 0)).any(dim=1).nonzero().view(-1)
    for some in mixed.split(_BLOCKS_AT_ONCE):
        cells = (some[:, None] * STATE_BLOCK + torch.arange(STATE_BLOCK, device=codes.device)).view(-1)
        inside = cells < codes.numel()  # the last block may be short: its gap counts as zeros
        values = torch.zeros(cells.shape, device=codes.device)
        values[inside] = table[codes[cells[inside]].long()] * scales[cells[inside]]
        fresh, own = torch.empty_like(values, dtype=torch.uint8), torch.empty_like(some, dtype=torch.float32)
        encode(values, fresh, own, signed)
        codes[cells[inside]] = fresh[inside]
        largest[some] = own
    return largest


def _own(value: Any) -> Any:
    """Counters are counted by each part for itself; maps are shared."""
    return value.clone() if torch.is_tensor(value) and value.numel() == 1 else value


def _unpaged(tensor: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
    """Paged tensors of bitsandbytes lie in memory that CUDA manages: host addresses that must not be given back."""
    return tensor.to(master.device, copy=True) if getattr(tensor, "is_paged", False) else tensor
