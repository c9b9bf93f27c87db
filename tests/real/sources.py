"""Real models and text in the shape that a configuration names. Imports transformers; no deepspeed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from progtuning_ds.assets import SMOLLM2, cache_root, ensure_asset


def smollm2_dir() -> Path:
    """Folder of SmolLM2-135M-Instruct as transformers saves models, made from its GGUF file once (540 MB)."""
    target = cache_root() / "assets" / f"{SMOLLM2.folder}-safetensors"
    if not target.exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

        source, new = ensure_asset(SMOLLM2), target.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf")
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        whole = LlamaForCausalLM(config)
        whole.load_state_dict(read.state_dict())
        whole.tie_weights()
        whole.save_pretrained(new)
        AutoTokenizer.from_pretrained(source, gguf_file="model.gguf").save_pretrained(new)
        new.rename(target)
    return target


def untuned_scores(given: dict[str, Any]) -> dict[str, float]:
    """What the model scores on a run's validation rows before it is tuned, by the run's own code; on every rank."""
    from transformers import set_seed

    from progtuning_ds.config import run_config
    from progtuning_ds.train.evaluate import evaluate
    from progtuning_ds.train.job import prepare_job
    from progtuning_ds.train.models import load_model
    from progtuning_ds.train.ranks import hardware, start_ranks

    config, ranks = run_config(given), start_ranks()
    job = ranks.local_first(lambda: prepare_job(config, hardware(ranks)))
    set_seed(config.train.seed)
    model = load_model(job.task.auto_class, config.model, job.shape, job.settings.precision)
    rows = job.task.evaluations["validation"]
    return evaluate(job.task, model, rows, ranks, job.settings.eval_batch_size)[0]
