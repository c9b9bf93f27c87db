"""The Trainer callback: the same training as the project's own loop, with DeepSpeed and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from progtuning_ds import ProgtuningCallback
from progtuning_ds.errors import ConfigError
from progtuning_ds.train.records import EvaluationRecord, StepRecord, read_records
from tests.ranks import RankPools
from tests.train import tiny
from tests.trainer.hf_run import EPOCHS, GLOBAL_BATCH, SEED, TRAIN_ROWS, Told, hf_train, own_loop

STEPS = EPOCHS * TRAIN_ROWS // GLOBAL_BATCH


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **SAVE3},
        **more,
    }


SAVE3 = {"stage3_gather_16bit_weights_on_model_save": True}
OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
        "warmup_type": "linear",
    },
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sources(tmp_path_factory.mktemp("trainer"), TRAIN_ROWS, 12, layers=3)


@pytest.fixture(scope="module")
def own(ranks: RankPools, sources: Path) -> tuple[list[StepRecord], float]:
    """Losses of the project's loop: they do not depend on ranks, micro-batches or the ZeRO stage (another test)."""
    given = {
        "model": {"path": str(sources / "model")},
        "data": {"train_file": str(sources / "train.csv"), "validation_file": str(sources / "test.csv")},
        "schedule": {"num_stages": 3},
        "train": {
            "epochs": EPOCHS,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": 2,
            "learning_rate": 5e-3,
            "seed": SEED,
            "group_by_length": False,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
        },
        "logging": {"progress": "off", "plot": False},
        "deepspeed": "zero2",
        "output_dir": str(sources / "own"),
    }
    ranks(2).run(own_loop, given=given)
    last = read_records(sources / "own", EvaluationRecord)[-1].metrics["loss"]
    return read_records(sources / "own", StepRecord), last


def check_same(told: Told, own: tuple[list[StepRecord], float], first: int = 0) -> None:
    records, last = own
    assert told.losses == pytest.approx([record.loss for record in records], abs=3e-5)
    assert told.norms == pytest.approx([record.grad_norm for record in records], rel=1e-3)
    assert told.eval_loss == pytest.approx(last, abs=3e-5)


@pytest.mark.parametrize(
    ("world_size", "deepspeed"),
    [(1, None), (2, None), (2, zero(2)), (2, zero(3, optimizer=OPTIMIZER, scheduler=SCHEDULER))],
    ids=["alone", "ddp", "zero2", "zero3-json"],
)
def test_a_trainer_with_the_callback_loses_what_the_own_loop_does(
    ranks: RankPools, sources: Path, tmp_path: Path, own: tuple, world_size: int, deepspeed: dict | None
) -> None:
    told = ranks(world_size).run(
        hf_train,
        model_dir=str(sources / "model"),
        output=str(tmp_path),
        world_size=world_size,
        deepspeed=deepspeed,
        late=world_size == 1,
    )
    assert len(told[0].losses) == STEPS
    if deepspeed and "optimizer" in deepspeed:
        # DeepSpeed's optimizer of the JSON decays biases and norms too, and its warm-up is one step off.
        assert told[0].losses[:1] == pytest.approx([own[0][0].loss], abs=3e-5)
        assert told[0].losses[-1] < told[0].losses[0]
    else:
        check_same(told[0], own)
    for rank in told:
        assert rank.stages == [1, 2]
        assert min(rank.released) > 0
        assert rank.moved == [0, 0], "the optimizer was laid out for the plan"
    assert told[0].weights == told[-1].weights or deepspeed is not None


@pytest.mark.parametrize(
    ("world_size", "deepspeed"),
    [(1, None), (2, None), (2, zero(2)), (2, zero(3))],
    ids=["alone", "ddp", "zero2", "zero3"],
)
@pytest.mark.parametrize("saved", [5, pytest.param(12, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    ranks: RankPools, sources: Path, tmp_path: Path, world_size: int, deepspeed: dict | None, saved: int
) -> None:
    """Saved in the last step of a stage (the next one begins on resume), and within the last stage."""
    common: dict[str, Any] = {
        "model_dir": str(sources / "model"),
        "output": str(tmp_path / "run"),
        "world_size": world_size,
        "deepspeed": deepspeed,
    }
    whole = ranks(world_size).run(hf_train, **common, save_strategy="steps", save_steps=saved)
    folder = tmp_path / "run" / f"checkpoint-{saved}"
    resumed = ranks(world_size).run(hf_train, **common, resume=str(folder))
    for before, after in zip(whole, resumed, strict=True):
        assert after.losses[saved:] == before.losses[saved:]
        assert after.rates[saved:] == before.rates[saved:]
        assert after.weights == before.weights
        assert after.stages == [stage for stage in before.stages if stage is not None and 5 * stage >= saved]
        assert after.held == before.held


@pytest.mark.parametrize("deepspeed", [None, zero(2), zero(3)], ids=["ddp", "zero2", "zero3"])
def test_the_best_model_may_be_of_an_earlier_stage(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: dict | None
) -> None:
    told = ranks(2).run(
        hf_train,
        model_dir=str(sources / "model"),
        output=str(tmp_path),
        world_size=2,
        deepspeed=deepspeed,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    logs = json.loads((tmp_path / "checkpoint-15" / "trainer_state.json").read_text())["log_history"]
    seen = {entry["step"]: entry["eval_loss"] for entry in logs if "eval_loss" in entry}
    best = min(seen, key=seen.__getitem__)
    assert best <= 10, f"the test wants an earlier stage, got step {best}"
    assert told[0].eval_loss == pytest.approx(seen[best], abs=1e-6)
    assert told[0].eval_loss != pytest.approx(seen[15], abs=1e-4)


@pytest.mark.parametrize("deepspeed", [None, zero(2)], ids=["ddp", "zero2"])
def test_an_epoch_may_end_in_mid_accumulation(
    ranks: RankPools, sources: Path, tmp_path: Path, deepspeed: dict | None
) -> None:
    """38 rows an epoch on two ranks in micro-batches of 2: ten batches, then steps of 4, 4 and 2 of them."""
    told = ranks(2).run(
        hf_train,
        model_dir=str(sources / "model"),
        output=str(tmp_path),
        world_size=2,
        deepspeed=deepspeed,
        drop_rows=TRAIN_ROWS * EPOCHS - 38,
        gradient_accumulation_steps=4,
        num_train_epochs=3,
        stages=3,
    )
    for rank in told:
        assert rank.stages == [1, 2]
        assert len(rank.losses) == 9


def test_embeddings_that_freeze_and_a_custom_plan(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    from progtuning_ds import custom_plan

    plan = custom_plan(
        3,
        [
            {"blocks": "1-2", "steps": 5, "embeddings": False},
            {"blocks": "0-1", "steps": 5, "embeddings": True},
            {"blocks": "2", "steps": 5, "embeddings": False},
        ],
    )
    common = {"model_dir": str(sources / "model"), "world_size": 2, "stages": None, "callback": {"plan": plan}}
    runs = [
        ranks(2).run(hf_train, **common, output=str(tmp_path / name), deepspeed=deepspeed)
        for name, deepspeed in (("ddp", None), ("zero2", zero(2)), ("zero3", zero(3)))
    ]
    for told in runs[1:]:
        assert told[0].losses == pytest.approx(runs[0][0].losses, abs=3e-5)
        assert told[0].stages == [1, 2]
        assert told[0].trainable == runs[0][0].trainable


def test_a_second_run_of_the_same_trainer_starts_with_all_blocks(
    ranks: RankPools, sources: Path, tmp_path: Path
) -> None:
    once, twice = (
        ranks(2).run(
            hf_train, model_dir=str(sources / "model"), output=str(tmp_path), world_size=2, stages=3, runs=runs
        )
        for runs in (1, 2)
    )
    assert once[0].stages == twice[0].stages == [1, 2]
    assert once[0].trainable == twice[0].trainable
    assert twice[0].held == once[0].held


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, zero(2), zero(3)], ids=["alone", "zero2", "zero3"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_recomputed_activations_change_nothing(
    ranks: RankPools, sources: Path, tmp_path: Path, own: tuple, deepspeed: dict | None, reentrant: bool
) -> None:
    """Embeddings train, so that blocks which freeze have inputs that require grad; the blocks above get theirs."""
    world_size = 2 if deepspeed else 1
    told = ranks(world_size).run(
        hf_train,
        model_dir=str(sources / "model"),
        output=str(tmp_path),
        world_size=world_size,
        deepspeed=deepspeed,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    check_same(told[0], own)
    assert told[0].stages == [1, 2]


@pytest.mark.slow
def test_embeddings_may_freeze_where_recomputing_is_not_reentrant(
    ranks: RankPools, sources: Path, tmp_path: Path
) -> None:
    common = {
        "model_dir": str(sources / "model"),
        "output": str(tmp_path),
        "world_size": 2,
        "deepspeed": zero(2),
        "callback": {"embeddings": "first_stage"},
    }
    plain = ranks(2).run(hf_train, **common)
    again = ranks(2).run(
        hf_train, **common, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert again[0].losses == pytest.approx(plain[0].losses, abs=1e-6)
    with pytest.raises(AssertionError, match="gradient checkpointing must be non-reentrant when embeddings freeze"):
        ranks(2).run(
            hf_train, **common, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
        )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_that_froze_are_saved_too(ranks: RankPools, sources: Path, tmp_path: Path, stage: int) -> None:
    told = ranks(2).run(
        hf_train,
        model_dir=str(sources / "model"),
        output=str(tmp_path),
        world_size=2,
        deepspeed=zero(stage),
        lora=True,
        keep=True,
    )
    assert told[0].stages == [1, 2]
    saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
    lora = {name: values for name, values in told[0].weights.items() if "lora_" in name}
    assert len(lora) == 3 * 2 * 2, "three blocks, two layers, two matrices"
    for name, values in lora.items():
        assert saved[name.replace(".default", "")].flatten().tolist() == values
    assert not any("query.base_layer" in name for name in saved)
    moved = [
        block for block in range(3) if any(f"layer.{block}." in n and "lora_B" in n and any(v) for n, v in lora.items())
    ]
    assert moved == [0, 1, 2], "all adapters trained before they froze"


def test_what_does_not_fit_is_one_line(ranks: RankPools, sources: Path, tmp_path: Path) -> None:
    common = {"model_dir": str(sources / "model"), "output": str(tmp_path), "world_size": 1}
    with pytest.raises(AssertionError, match=r"num_stages must be given where max_steps is \(4\)"):
        ranks(1).run(hf_train, **common, stages=None, max_steps=4)
    with pytest.raises(ConfigError, match="length_unit must be one of fractions, steps, got 'epochs'"):
        ProgtuningCallback(3, length_unit="epochs")


def test_sft_trainer_of_trl_needs_no_change(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed; pip install trl")
    from datasets import Dataset
    from transformers import LlamaForCausalLM

    from tests.tasks import tiny_lm

    ours = ProgtuningCallback(3)
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(tiny_lm.config()),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=2,
            num_train_epochs=3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": tiny_lm.texts(8)}),
        processing_class=tiny_lm.tokenizer(),
        callbacks=[ours],
    )
    trainer.train()
    assert isinstance(trainer, trl.SFTTrainer)
    assert [transition.stage for transition in ours.transitions] == [1, 2]
    assert min(sum(transition.released_bytes.values()) for transition in ours.transitions) > 0
