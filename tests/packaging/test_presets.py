"""The shipped DeepSpeed presets, against DeepSpeed's own schema."""

import json

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from progtuning_ds.presets import preset_names, preset_path

HIDDEN_SIZE_KEYS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def load(name: str) -> dict:
    return json.loads(preset_path(name).read_text())


@pytest.mark.parametrize("name", preset_names())
def test_deepspeed_knows_every_zero_setting_and_the_stage_is_the_named_one(name):
    settings = load(name)["zero_optimization"]
    filled = {key: 1000 if value == "auto" and key in HIDDEN_SIZE_KEYS else value for key, value in settings.items()}
    zero = DeepSpeedZeroConfig(**filled)  # refuses unknown keys
    assert int(zero.stage) == (0 if name == "single_gpu" else int(name[4]))
    assert (zero.offload_optimizer is not None) == name.endswith("_offload")


@pytest.mark.parametrize("name", preset_names())
def test_what_the_run_decides_is_left_to_the_run(name):
    preset = load(name)
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert {preset[key] for key in (*batch, "gradient_clipping")} == {"auto"}
    assert preset["bf16"] == preset["fp16"] == {"enabled": "auto"}
    assert {preset["optimizer"]["params"][key] for key in ("lr", "betas", "eps", "weight_decay")} == {"auto"}


@pytest.mark.parametrize("name", preset_names())
def test_offload_leaves_the_optimizer_to_deepspeeds_cpu_adam(name):
    assert ("torch_adam" in load(name)["optimizer"]["params"]) != name.endswith("_offload")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"got 'zero3-offload'; did you mean 'zero3_offload'\?"):
        preset_path("zero3-offload")
