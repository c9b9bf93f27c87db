"""What the stage engine costs and saves on a BERT-base-sized model, with plain DeepSpeed beside it.

    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 benchmarks/stage_engine.py --zero 2          # two CPU ranks
    deepspeed benchmarks/stage_engine.py --zero 3 --micro-batch 16 --seq-len 128           # the GPUs that are there

Four parts: overhead of the stage engine in a step (two engines in one process, interleaved), planned transitions,
an unplanned transition, and throughput of every stage against full fine-tuning and against the FLOP bound. Compared
things run in the same process, in turns; figures are medians. Rank 0 prints a table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from progtuning_ds import StageEngine, discover_blocks, param_groups, plan_stages
from progtuning_ds.blocks import set_trainable
from progtuning_ds.layout import flat_layout
from progtuning_ds.repartition import least_traffic

SIZES = {
    "bert-base": BertConfig(),
    "bert-large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "tiny": BertConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=6, num_attention_heads=2, intermediate_size=128
    ),
}
MIB = 2**20


@dataclass
class Report:
    """Everything that was measured; seconds, bytes and ratios."""

    environment: dict[str, Any]
    overhead: dict[str, float] = field(default_factory=dict)
    planned: list[dict[str, Any]] = field(default_factory=list)
    unplanned: dict[str, Any] = field(default_factory=dict)
    throughput: list[dict[str, Any]] = field(default_factory=list)


class Bench:
    """Builds engines of one configuration and times their steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank = dist.get_rank()
        self.device = get_accelerator().current_device_name()
        config = SIZES[options.model]
        generator = torch.Generator().manual_seed(self.rank)
        shape = (options.micro_batch, options.seq_len)
        self.batch = {
            "input_ids": torch.randint(0, config.vocab_size, shape, generator=generator).to(self.device),
            "labels": torch.randint(0, 2, shape[:1], generator=generator).to(self.device),
        }

    def model(self) -> BertForSequenceClassification:
        torch.manual_seed(0)
        return BertForSequenceClassification(SIZES[self.options.model])

    def engine(self, model: torch.nn.Module, groups: list[dict[str, Any]]) -> Any:
        on_gpu = get_accelerator().device_name() != "cpu"
        config = {
            "train_micro_batch_size_per_gpu": self.options.micro_batch,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "torch_adam": not on_gpu}},
            "bf16": {"enabled": on_gpu},
            "zero_optimization": {"stage": self.options.zero},
        }
        return deepspeed.initialize(model=model, model_parameters=groups, config=config)[0]

    def plain(self) -> Any:
        model = self.model()
        return self.engine(model, ordinary_groups(model))

    def staged(self, embeddings: str, ordinary: bool = False) -> StageEngine:
        model = self.model()
        blocks = discover_blocks(model)
        plan = plan_stages(len(blocks), self.options.stages, self.options.stages, embeddings=embeddings)
        groups = ordinary_groups(model) if ordinary else param_groups(model, plan, blocks, weight_decay=0.01)
        return StageEngine(self.engine(model, groups), plan, blocks)

    def step(self, engine: Any) -> float:
        dist.barrier()
        self.synchronize()
        began = time.perf_counter()
        engine.backward(engine(**self.batch).loss)
        engine.step()
        self.synchronize()
        return time.perf_counter() - began

    def steps(self, engine: Any) -> float:
        self.step(engine)  # warm up: allocations, ZeRO-3's trace
        return statistics.median(self.step(engine) for _ in range(self.options.repeats))

    def synchronize(self) -> None:
        if not get_accelerator().is_synchronized_device():
            get_accelerator().synchronize()

    def flops(self, names: list[str] | None) -> int:
        """Counted FLOPs of forward and backward when only ``names`` train; on the meta device, without running."""
        with torch.device("meta"):
            model = BertForSequenceClassification(SIZES[self.options.model])
        if names is not None:
            set_trainable(model, names)
        batch = {name: tensor.to("meta") for name, tensor in self.batch.items()}
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        return counter.get_total_flops()


def close(engine: Any) -> None:
    """Free what an engine holds: ZeRO-3's hooks keep a destroyed one alive."""
    engine.destroy()
    vars(engine.optimizer).clear()
    vars(engine).clear()
    gc.collect()


def ordinary_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """What most scripts pass to DeepSpeed: one group that decays, one that does not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class PeakMemory:
    """Peak of what this process (CPU) or the allocator (accelerator) held inside a ``with`` block, above its start."""

    def __enter__(self) -> PeakMemory:
        self._on_cpu = get_accelerator().device_name() == "cpu"
        if self._on_cpu:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the high-water mark
        else:
            get_accelerator().reset_peak_memory_stats()
        self.start = self._now()
        return self

    def __exit__(self, *exc: object) -> None:
        peak = _status("VmHWM") if self._on_cpu else get_accelerator().max_memory_allocated()
        self.extra = max(0, peak - self.start)
        self.change = self._now() - self.start

    def _now(self) -> int:
        return _status("VmRSS") if self._on_cpu else get_accelerator().memory_allocated()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure_overhead(bench: Bench, report: Report) -> None:
    """A step of plain DeepSpeed and one through the stage engine at its first stage, in turns."""
    plain, stages = bench.plain(), bench.staged("always")
    stages.advance(0)
    bench.step(plain)
    bench.step(stages.engine)
    times: list[tuple[float, float]] = []
    for turn in range(bench.options.repeats):
        # Who goes first changes, so that neither always meets the warmer cache.
        pair = [bench.step(engine) for engine in ((plain, stages.engine) if turn % 2 else (stages.engine, plain))]
        times.append((pair[0], pair[1]) if turn % 2 else (pair[1], pair[0]))
        stages.advance(0)
    close(plain)
    close(stages.engine)
    report.overhead = {
        "plain_seconds": statistics.median(p for p, _ in times),
        "staged_seconds": statistics.median(s for _, s in times),
        "ratio": statistics.median(s / p for p, s in times),
    }


def measure_planned(bench: Bench, report: Report) -> None:
    """Boundaries of a plan, on groups laid out for it."""
    stages = bench.staged("always")
    stages.advance(0)
    for index in range(1, bench.options.stages):
        seconds = bench.steps(stages.engine)
        with PeakMemory() as memory:
            transition = stages.advance(index)
        report.planned.append(_record(transition, memory, seconds))
    bench.steps(stages.engine)
    close(stages.engine)


def measure_unplanned(bench: Bench, report: Report) -> None:
    """Freeze the lowest third of an engine with ordinary groups."""
    stages = bench.staged("always", ordinary=True)
    seconds = bench.steps(stages.engine)
    target = stages.blocks.trainable_names(stages.plan.stages[1])
    parameters = dict(stages.engine.module.named_parameters())
    sized = [
        [(n, getattr(p, "ds_numel", p.numel())) for n, p in parameters.items() if (len(_shape(p)) >= 2) == decays]
        for decays in (True, False)
    ]
    with PeakMemory() as memory:
        transition = stages.retarget(target)
    layout = flat_layout(sized, dist.get_world_size())
    bound = sum(least_traffic(layout, b, [n for n, _ in group if n in set(target)]) for b, group in enumerate(sized))
    close(stages.engine)
    report.unplanned = _record(transition, memory, seconds) | {
        "least_bytes": 0 if bench.options.zero in (0, 3) else 12 * bound,  # master, exp_avg, exp_avg_sq
        "chunk_bytes": stages.chunk_bytes,
    }


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _record(transition: Any, memory: PeakMemory, step_seconds: float) -> dict[str, Any]:
    return {
        "stage": transition.stage,
        "seconds": transition.seconds,
        "steps": transition.seconds / step_seconds,
        "moved_bytes": transition.moved_bytes,
        "extra_peak_bytes": memory.extra,
        "memory_change_bytes": memory.change,
        "released_bytes": transition.released_bytes,
    }


def measure_throughput(bench: Bench, report: Report) -> None:
    """Every stage of every embedding option, full fine-tuning stepping in turns with it."""
    plain = bench.plain()
    bench.step(plain)
    full_flops = bench.flops(None)
    for embeddings in ("always", "first_stage", "never"):
        stages = bench.staged(embeddings)
        for index, stage in enumerate(stages.plan.stages):
            stages.advance(index)
            bench.step(stages.engine)
            ratios = []
            for _ in range(bench.options.repeats):
                ratios.append(bench.step(plain) / bench.step(stages.engine))
            report.throughput.append(
                {
                    "embeddings": embeddings,
                    "stage": index,
                    "speedup": statistics.median(ratios),
                    "flop_bound": full_flops / bench.flops(list(stages.blocks.trainable_names(stage))),
                    "state_bytes": sum(stages.memory()[key] for key in ("master_weights", "exp_avg", "exp_avg_sq")),
                }
            )
        close(stages.engine)
        del stages
    close(plain)


def show(report: Report) -> None:
    console = Console(width=110)
    console.print_json(json.dumps(report.environment))
    if report.overhead:
        _show_overhead(console, report.overhead)
    if report.planned or report.unplanned:
        _show_transitions(console, report)
    if report.throughput:
        _show_throughput(console, report)


def _show_overhead(console: Console, o: dict[str, float]) -> None:
    console.print(f"step: plain {o['plain_seconds']:.3f} s, staged {o['staged_seconds']:.3f} s, ratio {o['ratio']:.4f}")


def _show_transitions(console: Console, report: Report) -> None:
    table = Table("transition", "seconds", "in steps", "moved MiB", "least MiB", "extra peak MiB", "change MiB")
    for name, row in [
        *((f"planned, stage {r['stage'] + 1}", r) for r in report.planned),
        *([("unplanned", report.unplanned)] if report.unplanned else []),
    ]:
        table.add_row(
            name,
            f"{row['seconds']:.3f}",
            f"{row['steps']:.4f}",
            f"{row['moved_bytes'] / MIB:.1f}",
            f"{row.get('least_bytes', 0) / MIB:.1f}",
            f"{row['extra_peak_bytes'] / MIB:.1f}",
            f"{row['memory_change_bytes'] / MIB:.1f}",
        )
    console.print(table)


def _show_throughput(console: Console, report: Report) -> None:
    table = Table("embeddings", "stage", "speed-up over full", "FLOP bound", "of the bound", "state MiB a rank")
    for row in report.throughput:
        table.add_row(
            row["embeddings"],
            str(row["stage"] + 1),
            f"{row['speedup']:.2f}x",
            f"{row['flop_bound']:.2f}x",
            f"{row['speedup'] / row['flop_bound']:.0%}",
            f"{row['state_bytes'] / MIB:.0f}",
        )
    console.print(table)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    import transformers

    accelerator = get_accelerator()
    name = accelerator.device_name()
    return {
        "hardware": platform.processor() or platform.machine() if name == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "ranks": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        **{key: value for key, value in vars(options).items() if key not in ("local_rank", "output")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="bert-base")
    parser.add_argument("--zero", type=int, choices=range(4), default=2)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=["overhead", "planned", "unplanned", "throughput"])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed()
    bench, report = Bench(options), Report(environment(options))
    for part, measure in (
        ("planned", measure_planned),
        ("unplanned", measure_unplanned),
        ("overhead", measure_overhead),
        ("throughput", measure_throughput),
    ):
        if part in options.parts:
            measure(bench, report)
            gc.collect()  # engines are full of cycles
    if dist.get_rank() == 0:
        show(report)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main()
