"""Makes DeepSpeed's own checkpoints complete on engines that hold frozen parameters.

``zero_to_fp32`` rebuilds frozen parameters from a record in the model file, which DeepSpeed writes for ZeRO-2 and 3
only (``engine.py``, ``_save_checkpoint``): from a ZeRO-1 checkpoint it silently leaves them out.
"""

from __future__ import annotations

import functools
from typing import Any

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
