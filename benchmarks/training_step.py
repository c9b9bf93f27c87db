"""Whole training steps with DeepSpeed's optimizer step and with the fused one, in turns, on the same model and data.

    deepspeed --num_gpus 1 benchmarks/training_step.py --model bert-large
    deepspeed --num_gpus 1 benchmarks/training_step.py --model llama-1b --micro-batch 4 --seq-len 1024
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 benchmarks/training_step.py --model tiny --frozen 0 2    # a smoke run

Under ZeRO-2 in bf16. Rows: DeepSpeed's own step, the fused one, and on one GPU the fused one replayed as a CUDA
graph; with the lowest blocks frozen by mask where --frozen says so. Times are medians; rank 0 prints a table and
writes JSON with --output.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, LlamaConfig

from progtuning_ds import StageEngine, discover_blocks, param_groups, plan_stages

MODELS: dict[str, tuple[Any, Any]] = {
    "bert-large": (
        AutoModelForMaskedLM,
        BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    ),
    "llama-1b": (
        AutoModelForCausalLM,
        LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
        ),
    ),
    "tiny": (
        AutoModelForCausalLM,
        LlamaConfig(
            vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4
        ),
    ),
}


class Contestant:
    """One live engine, timed step by step."""

    def __init__(self, name: str, kernel: str, options: argparse.Namespace) -> None:
        self.name = name
        auto_class, config = MODELS[options.model]
        torch.manual_seed(0)
        model = auto_class.from_config(config)
        blocks = discover_blocks(model)
        plan = plan_stages(len(blocks), 3, 3)
        on_gpu = get_accelerator().device_name() != "cpu"
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=param_groups(model, plan, blocks, weight_decay=0.01),
            config={
                "train_micro_batch_size_per_gpu": options.micro_batch,
                "gradient_clipping": 1.0,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 2},
                # On a GPU DeepSpeed's FusedAdam, which a JSON that says AdamW gets; elsewhere PyTorch's fused one.
                "optimizer": {
                    "type": "AdamW",
                    "params": {"lr": 1e-5} | ({} if on_gpu else {"torch_adam": True, "fused": True}),
                },
            },
        )
        self.engine = engine
        self.stages = StageEngine(engine, plan, blocks, kernel=kernel)
        generator = torch.Generator().manual_seed(dist.get_rank())
        tokens = torch.randint(0, config.vocab_size, (options.micro_batch, options.seq_len), generator=generator)
        self.captured: list[torch.cuda.CUDAGraph] = []
        self.batch = {"input_ids": tokens.to(engine.device), "labels": tokens.to(engine.device)}

    def step(self) -> tuple[float, float]:
        """Seconds of a whole step and of its ``engine.step()``."""
        dist.barrier()
        began = now()
        self.engine.backward(self.engine(**self.batch).loss)
        backward = now()
        self.engine.step()
        end = now()
        return end - began, end - backward

    def freeze_lowest(self, count: int) -> None:
        """Freeze blocks 0 to ``count`` - 1: by mask if the step is fused, else by a transition."""
        blocks = self.stages.blocks
        gone = {name for block in blocks.blocks[:count] for name in block}
        if self.stages.kernel == "deepspeed":
            self.stages.retarget([name for name in self.stages.trainable_names if name not in gone])
        else:
            self.stages.freeze(gone & set(self.stages.trainable_names))
            self.captured.clear()  # the grid of a launch is part of a graph


def replay_as_graph(contestant: Contestant) -> None:
    """Capture the fused step's launches once and replay them from then on; one rank, whose norm needs no reduction."""
    step = contestant.stages.masked_step
    captured = contestant.captured

    def run(reduce: Callable[[torch.Tensor], None] | None = None) -> None:
        if not captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                type(step).run(step, None)
            captured.append(graph)
        captured[0].replay()

    step.run = run  # type: ignore[method-assign]


def now() -> float:
    """Seconds, once the device has done its work."""
    if not get_accelerator().is_synchronized_device():
        get_accelerator().synchronize()
    return time.perf_counter()


def measure(contestants: list[Contestant], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every contestant with 0, ... lowest blocks frozen, step by step in turns."""
    rows = []
    for frozen in options.frozen:
        for contestant in contestants:
            if frozen:
                contestant.freeze_lowest(frozen)
        for _ in range(options.warm_up):
            for contestant in contestants:
                contestant.step()
        times = [[contestant.step() for contestant in contestants] for _ in range(options.repeats)]
        for index, contestant in enumerate(contestants):
            rows.append(
                {
                    "step": contestant.name,
                    "frozen_blocks": frozen,
                    "seconds": statistics.median(turn[index][0] for turn in times),
                    "optimizer_seconds": statistics.median(turn[index][1] for turn in times),
                    "speedup": statistics.median(turn[0][0] / turn[index][0] for turn in times),
                    "optimizer_speedup": statistics.median(turn[0][1] / turn[index][1] for turn in times),
                }
            )
    return rows


def show(environment: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    console = Console(width=110)
    console.print_json(json.dumps(environment))
    table = Table("optimizer step", "frozen blocks", "ms a step", "ms in step()", "whole step", "step()")
    for row in rows:
        table.add_row(
            row["step"],
            str(row["frozen_blocks"]),
            f"{1000 * row['seconds']:.1f}",
            f"{1000 * row['optimizer_seconds']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['optimizer_speedup']:.2f}x",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="bert-large")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--frozen", type=int, nargs="+", default=[0], help="lowest blocks frozen, in growing order")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed()
    contestants = [Contestant("DeepSpeed's own", "deepspeed", options), Contestant("fused", "auto", options)]
    if torch.cuda.is_available() and dist.get_world_size() == 1:
        contestants.append(Contestant("fused, CUDA graph", "auto", options))
        contestants[-1].step()  # kernels are compiled before anything is captured
        replay_as_graph(contestants[-1])
    gc.collect()
    rows = measure(contestants, options)
    environment = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "implementation": contestants[1].stages.kernel,
        **{name: getattr(options, name) for name in ("model", "micro_batch", "seq_len", "repeats")},
    }
    if dist.get_rank() == 0:
        show(environment, rows)
        if options.output:
            options.output.write_text(json.dumps({"environment": environment, "steps": rows}, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
