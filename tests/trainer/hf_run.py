"""Runs of Hugging Face's Trainer on live ranks, with the rows and weights of the project's own loop."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

TRAIN_ROWS, GLOBAL_BATCH, EPOCHS, SEED = 40, 8, 3, 0


@dataclass(frozen=True)
class Told:
    """What a run was, in plain values."""

    losses: list[float]
    rates: list[float]
    norms: list[float]
    stages: list[int | None]
    released: list[int]
    moved: list[int]
    trainable: int
    weights: dict[str, list[float]]
    eval_loss: float
    held: int


def fresh_accelerate() -> None:
    """Forget the accelerator of an earlier run in this process."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # which TrainingArguments with a DeepSpeed JSON set
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def train_rows(world_size: int, micro: int, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows in the order in which accelerate deals them out, so that ranks see what they see in the project's loop."""
    from progtuning_ds.train.order import RowOrder, micro_batches
    from tests.train import tiny

    rows = tiny.rows(TRAIN_ROWS, seed=1)
    order = RowOrder(TRAIN_ROWS, GLOBAL_BATCH, SEED)
    dealt = []
    for epoch in range(EPOCHS):
        for step in order.epoch(epoch):
            shares = [micro_batches(step, rank, world_size, micro) for rank in range(world_size)]
            dealt += [index for passes in zip(*shares, strict=True) for batch in passes for index in batch]
    return [rows[index] for index in dealt[:limit]]


def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Cross-entropy per row of an optimizer step; a BERT's own loss forgets that there is accumulation."""
    import torch

    losses = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return losses / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def encoded(rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    from datasets import Dataset

    texts = tokenizer([row["text"] for row in rows])
    return Dataset.from_dict({**texts, "labels": [int(row["label"] == "positive") for row in rows]})


def hf_train(
    model_dir: str,
    output: str,
    *,
    world_size: int,
    deepspeed: dict[str, Any] | str | None = None,
    micro: int = 2,
    stages: int = 3,
    callback: dict[str, Any] | None = None,
    resume: str | None = None,
    drop_rows: int = 0,
    late: bool = False,
    runs: int = 1,
    lora: bool = False,
    keep: bool = False,
    **arguments: Any,
) -> Told:
    """Train with a `Trainer` on this rank, one line apart from any other script; `keep` saves the model in `final`."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from progtuning_ds import ProgtuningCallback
    from tests.train import tiny

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    if deepspeed != "from accelerate":
        fresh_accelerate()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": GLOBAL_BATCH // micro // world_size,
        "num_train_epochs": 1,
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "per_device_eval_batch_size": 1,
        "seed": SEED,
        **arguments,
    }
    given = None if deepspeed == "from accelerate" else deepspeed
    args = TrainingArguments(output_dir=output, deepspeed=given, **settings)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    set_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    rows = train_rows(world_size, micro)
    ours = ProgtuningCallback(**{"num_stages": stages, **(callback or {})})
    trainer = InOrder(
        model=model,
        args=args,
        train_dataset=encoded(rows[: len(rows) - drop_rows], tokenizer),
        eval_dataset=encoded(tiny.rows(12, seed=2), tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_loss_func=mean_loss,
        callbacks=[] if late else [ours],
    )
    if late:
        trainer.add_callback(ours)
    for _ in range(runs):
        trainer.train(resume_from_checkpoint=resume)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate()
    if keep:
        trainer.save_model(f"{output}/final")
    assert ours.stages is not None
    held = sum(size for kind, size in ours.stages.memory().items() if kind not in ("weights", "gradients"))
    told = Told(
        losses=[entry["loss"] for entry in steps],
        rates=[entry["learning_rate"] for entry in steps],
        norms=[entry["grad_norm"] for entry in steps],
        stages=[transition.stage for transition in ours.transitions],
        released=[sum(transition.released_bytes.values()) for transition in ours.transitions],
        moved=[transition.moved_bytes for transition in ours.transitions],
        trainable=len(ours.stages.trainable_names),
        weights=_weights(trainer),
        eval_loss=metrics["eval_loss"],
        held=held,
    )
    torch.distributed.is_initialized() and torch.distributed.barrier()
    return told


def _weights(trainer: Any) -> dict[str, list[float]]:
    """The whole model, gathered where ZeRO-3 has divided it."""
    if trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.deepspeed) or {}
    else:
        state = trainer.model.state_dict()
    return {name: tensor.float().flatten().tolist() for name, tensor in state.items() if tensor.is_floating_point()}


def own_loop(given: dict[str, Any]) -> None:
    """The project's own program on this rank."""
    from progtuning_ds.config import run_config
    from progtuning_ds.train.quiet import quiet_libraries

    fresh_accelerate()
    config = run_config(given)
    quiet_libraries(config.logging)
    from progtuning_ds.train.program import run_program

    run_program(config)
