"""What DeepSpeed gets is complete: nothing "auto", every count that of the run."""

from __future__ import annotations

from typing import Any

import pytest

from progtuning_ds.config import Hardware, load_deepspeed, project, run_config, settle, settle_warmup
from progtuning_ds.errors import ConfigError
from progtuning_ds.presets import preset_names


def projected(deepspeed: Any, *, hidden_size: int | None = 64, steps: int = 30, **train: Any) -> dict[str, Any]:
    config = run_config({"train": {"epochs": 3, **train}, "deepspeed": deepspeed})
    source = load_deepspeed(config.deepspeed)
    settings = settle(config, source, Hardware(world_size=2))
    warmup = settle_warmup(config.train, source, steps)
    return project(config, source, settings, total_steps=steps, warmup_steps=warmup, hidden_size=hidden_size)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_filled_as_hugging_face_fills_them(name: str) -> None:
    """The oracle is the Trainer's own code, on the same preset and the same numbers."""
    import json
    from types import SimpleNamespace

    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    from progtuning_ds.presets import preset_path

    theirs = HfTrainerDeepSpeedConfig(json.loads(preset_path(name).read_text()))
    args = SimpleNamespace(
        world_size=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_grad_norm=0.7,
        learning_rate=1e-4,
        adam_beta1=0.9,
        adam_beta2=0.98,
        adam_epsilon=1e-7,
        weight_decay=0.05,
        save_on_each_node=False,
        fp16=False,
        fp16_full_eval=False,
        bf16=True,
        bf16_full_eval=False,
        get_warmup_steps=lambda steps: 6,
    )
    theirs.trainer_config_process(args)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
    theirs.trainer_config_finalize(args, model, num_training_steps=30)
    ours = projected(
        name,
        micro_batch_size=4,
        gradient_accumulation_steps=4,
        max_grad_norm=0.7,
        learning_rate=1e-4,
        adam_beta2=0.98,
        adam_epsilon=1e-7,
        weight_decay=0.05,
        precision="bf16",
        warmup_steps=6,
    )
    assert ours == theirs.config


def test_a_bare_json_gets_an_optimizer_and_the_batch_sizes() -> None:
    got = projected({"zero_optimization": {"stage": 1}}, learning_rate=1e-3, global_batch_size=8)
    assert got["train_batch_size"] == 8
    assert got["train_micro_batch_size_per_gpu"] == 4
    assert got["optimizer"]["type"] == "AdamW"
    assert got["optimizer"]["params"]["lr"] == 1e-3
    assert got["optimizer"]["params"]["torch_adam"] is True
    assert "scheduler" not in got, "the run brings its own"


def test_offload_leaves_the_choice_of_adam_to_deepspeed() -> None:
    got = projected({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert "torch_adam" not in got["optimizer"]["params"]


def test_an_optimizer_of_another_kind_gets_nothing_it_may_not_know() -> None:
    got = projected({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}})
    assert got["optimizer"]["params"] == {"momentum": 0.9, "lr": 5e-5}


def test_what_the_user_asked_for_is_added_where_the_json_is_silent() -> None:
    got = projected({"optimizer": {"type": "Adam"}}, adam_epsilon=1e-6, weight_decay=0.0)
    assert got["optimizer"]["params"] == {"lr": 5e-5, "eps": 1e-6, "weight_decay": 0.0}


def test_a_scheduler_of_another_length_is_refused_with_both_lengths() -> None:
    json_ = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 500, "warmup_num_steps": 3}}}
    with pytest.raises(ConfigError) as caught:
        projected(json_)
    assert "scheduler.params.total_num_steps is 500" in str(caught.value)
    assert "the run has 30 steps (train.epochs 3 x 10)" in str(caught.value)


def test_an_auto_that_nobody_can_fill_is_named() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization.sub_group_size cannot be auto"):
        projected({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})
    with pytest.raises(ConfigError, match=r"zero_optimization.reduce_bucket_size cannot be auto"):
        projected("zero2", hidden_size=None)


def test_the_users_json_is_not_changed() -> None:
    setting = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    projected(setting)
    assert setting == {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
