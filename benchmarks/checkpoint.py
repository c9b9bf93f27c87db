"""What a checkpoint costs: ours and DeepSpeed's own, of the same live engine, in turns.

    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 benchmarks/checkpoint.py --zero 2 --folder /tmp/bench    # two CPU ranks
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 benchmarks/checkpoint.py --lora --folder /tmp/bench      # adapters
    deepspeed benchmarks/checkpoint.py --zero 3 --model bert-large --folder /scratch/bench              # GPUs

Save: how long training waits, what a few steps with a save take more than without, bytes written, and host memory a
rank needs on top while it lasts. A save into an empty folder is told apart from a later one, which links what has not
changed, and both from one in the background. DeepSpeed syncs nothing to the disk, so it is timed as it is and with its
files synced, which is what ours promises. Resume: from an engine that is built to one that can train. In the first
stage, where all trains, and in the last. Medians of rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

from progtuning_ds import StageEngine, discover_blocks, param_groups, plan_stages
from progtuning_ds.checkpoint import BackgroundSave, CheckpointStore, load_checkpoint, save_checkpoint
from progtuning_ds.checkpoint.sharing import written_bytes
from progtuning_ds.checkpoint.store import sync_folder
from progtuning_ds.methods import Method, apply_method

SIZES = {
    "bert-base": BertConfig(),
    "bert-large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "bert-medium": BertConfig(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048),
    "tiny": BertConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=2, intermediate_size=128),
}
MIB = 2**20
STEPS_BESIDE = 4  # while a save in the background is under way


def build(options: argparse.Namespace) -> StageEngine:
    torch.manual_seed(0)
    model = BertForSequenceClassification(SIZES[options.model])
    if options.lora:
        model = apply_method(model, Method(kind="lora", rank=8))
    blocks = discover_blocks(model)
    plan = plan_stages(len(blocks), 3, 3)
    on_gpu = get_accelerator().device_name() != "cpu"
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "bf16": {"enabled": on_gpu or options.bf16},
        "zero_optimization": {"stage": options.zero},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=param_groups(model, plan, blocks), config=config)
    return StageEngine(engine, plan, blocks)


def step(stages: StageEngine, number: int) -> None:
    stages.advance(number)
    device = stages.engine.device
    ids = torch.randint(0, 1000, (1, 16), device=device)
    stages.engine.backward(stages.engine(input_ids=ids, labels=torch.zeros(1, dtype=torch.long, device=device)).loss)
    stages.engine.step()


class Peak:
    """Most resident memory of this process while entered, beyond what it began with; bytes."""

    def __enter__(self) -> Peak:
        gc.collect()
        self._process = psutil.Process()
        self._before = self.most = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, self._process.memory_info().rss)

    @property
    def extra(self) -> int:
        return self.most - self._before


def timed(function: Callable[[], Any]) -> dict[str, float]:
    """Seconds from the first rank's start to the last one's end, and the largest extra memory of a rank."""
    dist.barrier()
    began = time.perf_counter()
    with Peak() as peak:
        function()
        dist.barrier()
        seconds = time.perf_counter() - began
    most = torch.tensor([float(peak.extra)], device=get_accelerator().current_device_name())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return {"seconds": seconds, "extra_bytes": most.item()}


def deepspeed_save(stages: StageEngine, folder: Path, *, sync: bool) -> None:
    stages.engine.save_checkpoint(str(folder), tag="here")
    if sync:
        rank = dist.get_rank()
        for number, path in enumerate(sorted((folder / "here").iterdir())):
            if number % dist.get_world_size() == rank:
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        sync_folder(folder / "here")


@dataclass(frozen=True)
class Way:
    """A way to save; `later` for one that finds an earlier checkpoint. `save` returns the seconds training waited."""

    save: Callable[[Path, int], float | None]
    load: Callable[[StageEngine, Path], Any] | None = None
    later: bool = False


def ways_of(stages: StageEngine, number: int) -> dict[str, Way]:
    def ours(folder: Path, at: int) -> None:
        save_checkpoint(stages, folder, at)

    def background(folder: Path, at: int) -> float:
        save = BackgroundSave(stages, folder, at)
        for _ in range(STEPS_BESIDE):
            step(stages, number)
        save.finish()
        return save.stalled

    return {
        "ours": Way(ours, resume),
        "ours, later": Way(ours, later=True),
        "ours, later, in the background": Way(background, later=True),
        "DeepSpeed": Way(
            lambda folder, at: deepspeed_save(stages, folder, sync=False),
            lambda fresh, folder: deepspeed_resume(fresh, folder, number),
        ),
        "DeepSpeed, synced": Way(lambda folder, at: deepspeed_save(stages, folder, sync=True)),
    }


def measure(options: argparse.Namespace, stages: StageEngine, number: int) -> list[dict[str, Any]]:
    """Saves in turns, then loads in turns, all of the same stage."""
    ways = ways_of(stages, number)
    saves: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    loads: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    sizes: dict[str, int] = {}
    for round_ in range(options.rounds + 1):
        for name, way in ways.items():
            folder = options.folder / name.replace(", ", "-").replace(" ", "-")
            clear(folder)
            if way.later:
                save_checkpoint(stages, folder, number + 1)
            plain = timed(lambda: [step(stages, number) for _ in range(STEPS_BESIDE)])["seconds"]
            waited: list[float | None] = []
            result = timed(lambda way=way, folder=folder, waited=waited: waited.append(way.save(folder, number + 2)))
            took = result["seconds"]
            result["costs"] = took if waited[0] is None else took - plain
            result["seconds"] = took if waited[0] is None else waited[0]
            sizes[name] = new_bytes(folder)
            if round_:  # the first is for warming up
                saves[name].append(result)
    for _ in range(options.rounds):
        for name, way in ways.items():
            if way.load is not None:
                fresh = build(options)
                loads[name].append(
                    timed(lambda fresh=fresh, way=way, name=name: way.load(fresh, options.folder / name))
                )
                fresh.engine.destroy()
                del fresh
                gc.collect()
    return [
        {
            "stage": stages.stage.index,
            "way": name,
            "written_bytes": sizes[name],
            "save_seconds": median(saves[name], "seconds"),
            "save_costs_seconds": median(saves[name], "costs"),
            "save_extra_bytes": median(saves[name], "extra_bytes"),
            "load_seconds": median(loads[name], "seconds"),
            "load_extra_bytes": median(loads[name], "extra_bytes"),
        }
        for name in ways
    ]


def new_bytes(folder: Path) -> int:
    """Bytes of the last save that were not there before."""
    steps = CheckpointStore(folder).steps()
    if steps:
        return written_bytes(CheckpointStore(folder).path(steps[0]))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resume(fresh: StageEngine, folder: Path) -> None:
    load_checkpoint(fresh, CheckpointStore(folder).candidates()[0])


def deepspeed_resume(fresh: StageEngine, folder: Path, number: int) -> None:
    for earlier in range(number + 1):
        fresh.advance(earlier)
    fresh.engine.load_checkpoint(str(folder), tag="here")


def clear(folder: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()


def median(results: list[dict[str, float]], key: str) -> float | None:
    return statistics.median(result[key] for result in results) if results else None


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("stage", "way", "written", "training waits", "costs", "extra memory", "resume", "extra memory")
    for row in rows:
        load, extra = row["load_seconds"], row["load_extra_bytes"]
        table.add_row(
            f"{row['stage'] + 1}/3",
            row["way"],
            f"{row['written_bytes'] / MIB:,.1f} MiB",
            f"{row['save_seconds']:.2f} s",
            f"{row['save_costs_seconds']:.2f} s",
            f"{row['save_extra_bytes'] / MIB:,.0f} MiB",
            "" if load is None else f"{load:.2f} s",
            "" if extra is None else f"{extra / MIB:,.0f} MiB",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--model", default="bert-base", choices=SIZES)
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 8 on a frozen base")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured; emptied")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--local_rank", type=int, default=0)
    options = parser.parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = get_accelerator().device_name() != "cpu"
    deepspeed.init_distributed()
    stages = build(options)
    rows: list[dict[str, Any]] = []
    for number in range(3):
        step(stages, number)
        if number != 1:
            rows += measure(options, stages, number)
    if dist.get_rank() == 0:
        show(rows)
        about = {"device": get_accelerator().device_name(), "cpus": os.cpu_count(), "machine": platform.machine()}
        about |= {"world_size": dist.get_world_size(), "torch": torch.__version__, "deepspeed": deepspeed.__version__}
        if options.out is not None:
            settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
            options.out.write_text(json.dumps({"about": about, "options": settings, "rows": rows}, indent=2) + "\n")
        shutil.rmtree(options.folder, ignore_errors=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
