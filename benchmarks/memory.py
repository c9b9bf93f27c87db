"""Two experiments on what memory is worth, on CPU ranks; figures for docs/memory.md.

    DS_ACCELERATOR=cpu python benchmarks/memory.py largest --limit 400MiB      # about 10 minutes on 2 cores
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 benchmarks/memory.py reinvest    # or on the GPUs that are there

``largest`` looks for the largest Llama-shaped model (blocks of width 256, fp32) that trains through all stages on two
ranks when the kernel allows each process so much data (RLIMIT_DATA) beyond what it has before the model is built: by
full fine-tuning, Progtuning, Progtuning with the moments of the lowest part elsewhere in stage 1, and LoRA. A size
counts if it really runs; sizes are tried by bisection.

``reinvest`` measures rows per second of every stage with the first stage's rows per pass and with as many as divide the
step, in turns on the same engine in the same process; medians, also to benchmarks/results/memory-DEVICE-reinvest.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

METHODS = ("full", "progtuning", "progtuning + host moments", "lora")
SEQ_LEN, ROWS, STAGES = 128, 2, 3
MIB = 2**20
RESULTS = Path(__file__).resolve().parent / "results"


def shape(blocks: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1000,
        max_position_embeddings=SEQ_LEN,
        use_cache=False,
        tie_word_embeddings=False,
    )


# ---- the largest model ----------------------------------------------------------------------------------------------


def trial(method: str, blocks: int, limit: int) -> None:
    """One rank: build, train a step of every stage, say how many parameters it was."""
    import resource

    import deepspeed
    import torch
    from transformers import LlamaForCausalLM

    from progtuning_ds import StageEngine, discover_blocks, param_groups, plan_stages
    from progtuning_ds.train.host_state import HostMoments
    from progtuning_ds.train.ranks import start_ranks

    start_ranks()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    most = 1024 * int(status["VmData"].split()[0]) + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape(blocks))
    total = sum(p.numel() for p in model.parameters())
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    found = discover_blocks(model)
    stages = 1 if method in ("full", "lora") else STAGES
    plan = plan_stages(len(found), stages, stages)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=param_groups(model, plan, found), config=config)
    staged = StageEngine(engine, plan, found)
    away = HostMoments(staged.adapter, stages) if "host" in method else None
    if away is not None:
        away.keep_away([0])
    ids = torch.randint(0, 1000, (ROWS, SEQ_LEN))
    for stage in plan.stages:
        staged.advance(stage.steps.start)
        for _ in range(2):  # the second step has its moments
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
    print("TRAINED", total, flush=True)


def runs(method: str, blocks: int, limit: int) -> int | None:
    """Parameters of a size that trains on two ranks, or None."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        environ = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": str(2**17),
        }
        command = [sys.executable, __file__, "trial", method, str(blocks), str(limit)]
        ranks.append(
            subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
    alive = list(ranks)
    while alive and not any(process.poll() for process in ranks):
        alive = [process for process in ranks if process.poll() is None]
        time.sleep(0.2)
    for process in ranks:  # the other one waits for a rank that ran out of memory
        if process.poll() is None:
            process.kill()
    outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        return None
    return int(next(line for line in outputs[0].splitlines() if line.startswith("TRAINED")).split()[1])


def largest(limit: int, most: int) -> list[dict[str, Any]]:
    """The largest number of blocks of every method, by bisection between 3 and ``most``."""
    table = []
    for method in METHODS:
        low, high, parameters = 0, most + 1, 0
        while high - low > 1:
            middle = max(STAGES, (low + high) // 2)
            if middle == low or middle >= high:
                break
            found = runs(method, middle, limit)
            print(f"{method}: {middle} blocks {'train' if found else 'do not fit'}", flush=True)
            if found:
                low, parameters = middle, found
            else:
                high = middle
        table.append({"method": method, "blocks": low, "parameters": parameters})
    return table


# ---- reinvestment ---------------------------------------------------------------------------------------------------


def reinvest(blocks: int, rows: int, repeats: int) -> dict[str, Any]:
    """Rows per second of every stage with one row per pass and with all, in turns on one engine; {} but on rank 0."""
    import deepspeed
    import torch
    from transformers import LlamaForCausalLM

    from progtuning_ds import StageEngine, discover_blocks, param_groups, plan_stages
    from progtuning_ds.train.memory_control import set_micro_batch
    from progtuning_ds.train.ranks import start_ranks

    ranks = start_ranks()
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape(blocks))
    found = discover_blocks(model)
    plan = plan_stages(len(found), STAGES, STAGES, "never")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": rows,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
        "bf16": {"enabled": ranks.device.type != "cpu"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=param_groups(model, plan, found), config=config)
    staged = StageEngine(engine, plan, found)
    ids = torch.randint(0, 1000, (rows, SEQ_LEN)).to(ranks.device)

    def step(size: int) -> float:
        set_micro_batch(engine, size)
        torch.distributed.barrier()
        began = time.perf_counter()
        for piece in ids.split(size):
            engine.backward(engine(input_ids=piece, labels=piece).loss)
            engine.step()
        if ranks.device.type != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    table = []
    for stage in plan.stages:
        staged.advance(stage.steps.start)
        seconds: dict[int, list[float]] = {1: [], rows: []}
        for repeat in range(repeats + 1):
            for size, times in seconds.items():
                took = step(size)
                if repeat:  # the first warms up
                    times.append(took)
        small, large = (ranks.world_size * rows / statistics.median(times) for times in seconds.values())
        spread = [max(times) / min(times) - 1 for times in seconds.values()]
        table.append(
            {
                "stage": stage.index,
                "rows_per_pass": [1, rows],
                "rows_per_second": [small, large],
                "seconds": list(seconds.values()),
            }
        )
        if ranks.is_first:
            print(
                f"stage {stage.index + 1}: {small:.2f} rows/s at 1 row per pass, {large:.2f} at {rows} "
                f"({large / small - 1:+.0%}; slowest over fastest step {spread[0]:+.0%}, {spread[1]:+.0%})",
                flush=True,
            )
    if not ranks.is_first:
        return {}
    return {
        "model": {"blocks": blocks, "parameters": sum(p.numel() for p in model.parameters())},
        "device": str(ranks.device) if ranks.device.type == "cpu" else torch.cuda.get_device_name(),
        "world_size": ranks.world_size,
        "rows_per_rank_and_step": rows,
        "tokens_per_row": SEQ_LEN,
        "repeats": repeats,
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        "stages": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("largest")
    one.add_argument("--limit", default="400MiB")
    one.add_argument("--most", type=int, default=96, help="blocks to try at most")
    other = commands.add_parser("reinvest")
    other.add_argument("--blocks", type=int, default=6)
    other.add_argument("--rows", type=int, default=8, help="rows per rank and step")
    other.add_argument("--repeats", type=int, default=5)
    hidden = commands.add_parser("trial")
    for name in ("method", "blocks", "limit"):
        hidden.add_argument(name)
    one.add_argument("--json", type=Path, help="file to write")
    other.add_argument("--json", type=Path, help="file to write; benchmarks/results/memory-DEVICE-reinvest.json")
    options = parser.parse_args()
    if options.command == "trial":
        trial(options.method, int(options.blocks), int(options.limit))
        return
    if options.command == "largest":
        from progtuning_ds.memory import parse_bytes

        table = largest(parse_bytes("limit", options.limit), options.most)
        print("\n| method | blocks | parameters |\n|---|---:|---:|")
        for row in table:
            print(f"| {row['method']} | {row['blocks']} | {row['parameters'] / 1e6:.1f} M |")
    else:
        table = reinvest(options.blocks, options.rows, options.repeats)
        if table and options.json is None:
            options.json = RESULTS / f"memory-{table['device'].replace(' ', '_')}-reinvest.json"
    if options.json and table:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
