"""Makes DeepSpeed's own checkpoints complete on engines that hold frozen parameters.

``zero_to_fp32`` rebuilds frozen parameters from a record in the model file, which DeepSpeed writes for ZeRO-2 and 3
only (``engine.py``, ``_save_checkpoint``): from a ZeRO-1 checkpoint it silently leaves them out.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from progtuning_ds.blocks import set_trainable
from progtuning_ds.errors import UnsupportedDeepSpeedError


def complete_checkpoints(engine: Any) -> None:
    """Make ``engine.save_checkpoint`` record frozen parameters under ZeRO-1 too; other flavours already do.

    Raises:
        UnsupportedDeepSpeedError: if this DeepSpeed saves checkpoints in another way.
    """
    if engine.zero_optimization_stage() != 1:
        return
    missing = [name for name in ("_save_checkpoint", "_common_checkpoint_state") if not hasattr(engine, name)]
    if missing and not hasattr(engine, "zero_optimization_partition_gradients"):
        raise UnsupportedDeepSpeedError(f"DeepSpeedEngine lacks {', '.join(missing)}; ZeRO-1 checkpoints need it")
    save = engine._save_checkpoint

    @functools.wraps(save)
    def save_with_frozen(*args: Any, **kwargs: Any) -> Any:
        # The engine asks itself whether gradients are partitioned, to decide whether to record frozen parameters.
        engine.zero_optimization_partition_gradients = lambda: True
        try:
            return save(*args, **kwargs)
        finally:
            del engine.zero_optimization_partition_gradients

    engine._save_checkpoint = save_with_frozen


def keep_in_exports(engine: Any, names: Collection[str]) -> None:
    """Let the weights that ``engine`` gathers under ZeRO-3 hold parameters ``names``, even without the frozen ones.

    For PEFT models the Trainer asks for what is not frozen, and means all but the base; adapters of blocks that froze
    would be left out.

    Args:
        engine: a live engine.
        names: parameters that count as trained, such as those of stage 0.
    """
    gather = getattr(engine, "_zero3_consolidated_16bit_state_dict", None)
    if gather is None or engine.zero_optimization_stage() != 3:
        return
    params = dict(engine.module.named_parameters())

    @functools.wraps(gather)
    def gather_what_trained(*args: Any, **kwargs: Any) -> Any:
        now = [name for name, parameter in params.items() if parameter.requires_grad]
        set_trainable(engine.module, {*now, *names})
        try:
            return gather(*args, **kwargs)
        finally:
            set_trainable(engine.module, now)

    engine._zero3_consolidated_16bit_state_dict = gather_what_trained
