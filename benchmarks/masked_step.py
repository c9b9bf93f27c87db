"""The fused masked step on one GPU: correctness, share of copy bandwidth, time against what trains, and rivals.

    python benchmarks/masked_step.py                                   # everything; writes masked_step.json
    python benchmarks/masked_step.py --sizes 335M --rivals deepspeed   # one model size, one rival
    python benchmarks/masked_step.py --tune --sizes 335M               # other tiles, blocks, warps and grids

Needs an NVIDIA GPU, Triton, and for the rivals DeepSpeed (which compiles its FusedAdam: nvcc) and bitsandbytes.
Correctness comes first: fresh random inputs, poisoned outputs, results compared bit for bit with plain PyTorch; a
mismatch ends the run. Times are medians of CUDA events after warm-up, in one process, on buffers larger than the L2
cache. (The file is not called kernels.py, because transformers and bitsandbytes would import it by that name.)
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from masked_step_problem import GROUPS, MAX_NORM, SIZES, Problem, fused
from masked_step_rivals import RIVALS
from progtuning_kernels import FlatBuffer, Launch, MaskedStep
from rich.console import Console
from rich.table import Table

WARM_UP, REPEATS = 10, 50
TENSORS = ("master", "weight", "remainder", "exp_avg", "exp_avg_sq", "absmax", "absmax_sq")
FROZEN = (0.0, 1 / 3, 2 / 3)
BYTES = {"master": 30, "remainder": 28, "stochastic": 24, "8-bit": 18}
"""Bytes the step needs to move per active element, bf16 gradients and both passes included."""


def missing_here() -> str | None:
    """Return in one line what this machine lacks, or None."""
    if not torch.cuda.is_available():
        return "benchmarks/masked_step.py needs an NVIDIA GPU and a CUDA build of PyTorch; none is available here"
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "benchmarks/masked_step.py needs Triton: pip install triton"
    return None


# ---- correctness ---------------------------------------------------------------------------------------------------


def check(precision: str, eight_bit: bool, launch: Launch) -> None:
    """Compare a few steps with plain PyTorch on the same GPU; raise `SystemExit` on the first difference."""
    sizes = ([(1021, 517), (256, 1024), (3, 5)], [(4097,), (1,), (1024,)])
    problem = Problem([[torch.Size(s) for s in group] for group in sizes])
    ours = fused(problem, precision, eight_bit, launch)
    theirs = MaskedStep(
        [copy_buffer(b) for b in ours.work.buffers], GROUPS, max_norm=MAX_NORM, gradients="segments", impl="reference"
    )
    for number, mask in enumerate(([[True] * 3] * 2, [[False, True, True], [True, False, True]], [[True] * 3] * 2)):
        gradients = [
            [g if trains else None for g, trains in zip(group, row, strict=True)]
            for group, row in zip(problem.gradients(), mask, strict=True)
        ]
        for step in (ours, theirs):
            step.set_active(mask)
            step.step(gradients, loss_scale=4.0)
        for index, (one, other) in enumerate(zip(ours.work.buffers, theirs.work.buffers, strict=True)):
            for name in TENSORS:
                a, b = getattr(one, name), getattr(other, name)
                if a is None:
                    continue
                if not same(a, b, codes=eight_bit):
                    what = f"{name} of buffer {index} in step {number}, {precision}, eight_bit={eight_bit}, {launch}"
                    raise SystemExit(f"the kernel and plain PyTorch differ in {what}")
                b.copy_(a)  # so that a code that may differ does not grow into a difference that may not
            written = torch.cat([one.weight[s.start : s.stop] for s in one.segments])
            if not written.isfinite().all():
                raise SystemExit(f"the kernel left weights unwritten: buffer {index}, {precision}, {launch}")


def copy_buffer(buffer: FlatBuffer) -> FlatBuffer:
    tensors = {name: getattr(buffer, name) for name in TENSORS}
    return replace(buffer, **{name: t.clone() for name, t in tensors.items() if t is not None})


def same(a: torch.Tensor, b: torch.Tensor, codes: bool) -> bool:
    """Bits, NaN included; where state is 8-bit, all but values in the middle between two codes, within rounding."""
    if not codes:
        raw = torch.int16 if a.element_size() == 2 else torch.int32
        return torch.equal(a.view(raw), b.view(raw))
    if a.dtype == torch.uint8:
        steps = (a.int() - b.int()).abs()
        return bool(steps.max() <= 1 and (steps > 0).float().mean() < 1e-3)
    return torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-3, equal_nan=True)


# ---- time ----------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object]) -> float:
    """Median time of a call on the GPU."""
    for _ in range(WARM_UP):
        function()
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 2 GiB within the GPU."""
    source = torch.empty(2 * 2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


@contextmanager
def fresh_memory() -> Iterator[None]:
    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def time_step(step: MaskedStep, gradients: list[list[torch.Tensor]], graph: bool) -> float:
    if not graph:
        return seconds(lambda: step.step(gradients))
    step.step(gradients)  # compiles
    step.bind(gradients)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step.run()
    return seconds(captured.replay)


def graph_launch() -> Launch:
    """A grid that fills the GPU and does not depend on the mask."""
    return Launch(persistent_programs=16 * torch.cuda.get_device_properties(0).multi_processor_count)


@dataclass
class Report:
    """Everything that was measured; seconds, and bytes per second."""

    environment: dict[str, Any]
    copy_bytes_per_second: float = 0.0
    fused: list[dict[str, Any]] = field(default_factory=list)
    rivals: list[dict[str, Any]] = field(default_factory=list)
    tuning: list[dict[str, Any]] = field(default_factory=list)


def measure_fused(size: str, report: Report) -> None:
    """Every variant with all active, and the plain one with thirds frozen, eager and from a graph."""
    problem = Problem.of(size)
    cases = [("master", False, frozen, graph) for frozen in FROZEN for graph in (False, True)]
    cases += [("remainder", False, 0.0, False), ("stochastic", False, 0.0, False), ("master", True, 0.0, False)]
    for precision, eight_bit, frozen, graph in cases:
        with fresh_memory():
            mask = problem.mask(frozen)
            step = fused(problem, precision, eight_bit, graph_launch() if graph else None)
            step.set_active(mask)
            time = time_step(step, problem.gradients(), graph)
            share = problem.active_share(mask)
            variant = "8-bit" if eight_bit else precision
            moved = BYTES[variant] * share * problem.numel / time
            row = {"size": size, "variant": variant, "graph": graph, "active": share, "seconds": time}
            report.fused.append(row | {"of_copy_bandwidth": moved / report.copy_bytes_per_second})


def measure_rivals(size: str, names: Sequence[str], report: Report) -> None:
    problem = Problem.of(size)
    for name in names:
        with fresh_memory():
            prepare, what = RIVALS[name]
            report.rivals.append({"size": size, "name": name, "what": what, "seconds": seconds(prepare(problem))})


def measure_tuning(size: str, report: Report) -> None:
    """Whole steps with other ways to cut the work; each is checked before it is timed."""
    problem = Problem.of(size)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for block, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8)):
        for blocks_per_tile in (1, 4):
            for persistent in (0, 8 * multiprocessors, 16 * multiprocessors):
                launch = Launch(block * blocks_per_tile, block, warps, persistent_programs=persistent)
                check("master", False, launch)
                with fresh_memory():
                    time = time_step(fused(problem, launch=launch), problem.gradients(), graph=False)
                report.tuning.append({"size": size, **asdict(launch), "seconds": time})


# ---- output --------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton", "deepspeed", "bitsandbytes"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "command": " ".join(["python", *sys.argv]),
        "warm_up": WARM_UP,
        "repeats": REPEATS,
        **versions,
    }


def show(report: Report) -> None:
    console = Console()
    console.print(f"{report.environment['gpu']}: copy bandwidth {report.copy_bytes_per_second / 1e12:.2f} TB/s")
    full = {
        (r["size"], r["graph"]): r["seconds"] for r in report.fused if r["variant"] == "master" and r["active"] == 1
    }
    if report.fused:
        table = Table("parameters", "state", "launch", "active", "ms", "of copy bandwidth", "time per active share")
        for r in report.fused:
            linear = r["seconds"] / full[r["size"], r["graph"]] / r["active"] if r["variant"] == "master" else None
            table.add_row(
                r["size"],
                r["variant"],
                "graph" if r["graph"] else "eager",
                f"{r['active']:.0%}",
                f"{r['seconds'] * 1e3:.3f}",
                f"{r['of_copy_bandwidth']:.0%}",
                "" if linear is None else f"{linear:.3f}",
            )
        console.print(table)
    if report.rivals:
        table = Table("parameters", "rival", "what it does", "ms", "fused step is faster by")
        for r in report.rivals:
            ours = full.get((r["size"], False))
            faster = "" if ours is None else f"{r['seconds'] / ours:.2f}x"
            table.add_row(r["size"], r["name"], r["what"], f"{r['seconds'] * 1e3:.3f}", faster)
        console.print(table)
    if report.tuning:
        table = Table("parameters", "tile", "block", "warps", "programs", "ms")
        for r in sorted(report.tuning, key=lambda row: (row["size"], row["seconds"])):
            cells = (r["size"], r["tile"], r["block"], r["warps"], r["persistent_programs"] or "one per tile")
            table.add_row(*map(str, cells), f"{r['seconds'] * 1e3:.3f}")
        console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--tune", action="store_true", help="time other launches instead")
    parser.add_argument("--output", type=Path, default=Path("masked_step.json"), help="JSON file to write")
    options = parser.parse_args()
    if lacks := missing_here():
        print(lacks, file=sys.stderr)
        return 2
    torch.manual_seed(torch.seed())  # fresh inputs in every run
    for launch in (Launch(), graph_launch()):
        for precision, eight_bit in (("master", False), ("remainder", False), ("stochastic", False), ("master", True)):
            check(precision, eight_bit, launch)
    report = Report(environment(), copy_bandwidth())
    with fresh_memory():
        for size in options.sizes:
            if options.tune:
                measure_tuning(size, report)
            else:
                measure_fused(size, report)
                measure_rivals(size, options.rivals, report)
    show(report)
    options.output.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
