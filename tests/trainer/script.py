"""A Trainer script as a launcher starts it: arguments are model folder, output folder, and the engine.

The engine is a ZeRO stage, `none`, or `accelerate` where accelerate's configuration names a DeepSpeed JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.trainer.hf_run import hf_train


def main() -> None:
    model, output, zero = sys.argv[-3:]  # the launcher puts --local_rank before them
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # inference alone needs it; it compiles for long
    config: Any = None
    if zero == "accelerate":
        config = "from accelerate"
        deepspeed.init_distributed(verbose=False)
    elif zero != "none":
        deepspeed.init_distributed(verbose=False)  # accelerate does it, but not on CPUs
        config = {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": int(zero), "stage3_gather_16bit_weights_on_model_save": True},
        }
    told = hf_train(model, output, world_size=int(os.environ["WORLD_SIZE"]), deepspeed=config)
    if os.environ["RANK"] == "0":
        content = {name: value for name, value in asdict(told).items() if name != "weights"}
        (Path(output) / "told.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
