"""The run configuration and a DeepSpeed JSON agree, or the two fields that do not are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progtuning_ds.config import Hardware, Settings, load_deepspeed, run_config, settle, settle_warmup
from progtuning_ds.errors import ConfigError

CPU = Hardware(world_size=2)
GPU = Hardware(world_size=2, device="cuda", bf16=True, fp16=True)
OLD_GPU = Hardware(world_size=2, device="cuda", bf16=False, fp16=True)


def settled(train: dict[str, Any], deepspeed: Any = "zero2", hardware: Hardware = CPU) -> Settings:
    config = run_config({"train": train, "deepspeed": deepspeed})
    return settle(config, load_deepspeed(config.deepspeed), hardware)


def refusal(train: dict[str, Any], deepspeed: Any = "zero2", hardware: Hardware = CPU) -> str:
    with pytest.raises(ConfigError) as caught:
        settled(train, deepspeed, hardware)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_hugging_faces_but_for_warm_up_and_batch() -> None:
    got = settled({})
    assert (got.learning_rate, got.betas, got.epsilon, got.max_grad_norm) == (5e-5, (0.9, 0.999), 1e-8, 1.0)
    assert (got.global_batch_size, got.micro_batch_size, got.gradient_accumulation_steps) == (32, 16, 1)
    assert settle_warmup(run_config({}).train, load_deepspeed("zero2"), 282) == 29


def test_the_deepspeed_json_is_used_where_the_run_says_nothing() -> None:
    json_ = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0}},
    }
    got = settled({}, json_)
    assert (got.micro_batch_size, got.gradient_accumulation_steps, got.global_batch_size) == (3, 5, 30)
    assert (got.learning_rate, got.betas, got.epsilon, got.weight_decay) == (3e-4, (0.8, 0.9), 1e-6, 0)
    assert (got.max_grad_norm, got.precision) == (0.5, "bf16")


@given(
    micro=st.integers(1, 8),
    passes=st.integers(1, 8),
    ranks=st.integers(1, 8),
    also=st.sets(st.sampled_from(["micro_batch_size", "gradient_accumulation_steps"])),
    in_json=st.booleans(),
)
def test_rows_per_step_are_micro_batch_times_accumulation_times_ranks(
    micro: int, passes: int, ranks: int, also: set[str], in_json: bool
) -> None:
    values = {"micro_batch_size": micro, "gradient_accumulation_steps": passes}
    wanted = {name: value for name, value in values.items() if name in also}
    rows = micro * passes * ranks
    if in_json:
        got = settled(wanted, {"train_batch_size": rows}, Hardware(world_size=ranks))
    else:
        got = settled({**wanted, "global_batch_size": rows}, {}, Hardware(world_size=ranks))
    assert got.micro_batch_size * got.gradient_accumulation_steps * ranks == got.global_batch_size == rows
    for name, value in wanted.items():
        assert getattr(got, name) == value


def test_micro_batch_and_accumulation_alone_make_the_global_batch() -> None:
    got = settled({"micro_batch_size": 3, "gradient_accumulation_steps": 7})
    assert got.global_batch_size == 3 * 7 * 2


def test_the_default_batch_is_refused_on_ranks_that_do_not_divide_it() -> None:
    said = refusal({}, {}, Hardware(world_size=3))
    assert "train.global_batch_size" in said
    assert "got 32; nearest: 30 or 33" in said


@pytest.mark.parametrize(
    ("train", "deepspeed", "words"),
    [
        (
            {"learning_rate": 1e-4},
            {"optimizer": {"type": "Adam", "params": {"lr": 2e-4}}},
            ("train.learning_rate is 0.0001", "optimizer.params.lr is 0.0002"),
        ),
        (
            {"learning_rate": 1e-4},
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}},
            ("train.learning_rate is 0.0001", "scheduler.params.warmup_max_lr is 0.001"),
        ),
        (
            {"max_grad_norm": 1.0},
            {"gradient_clipping": 2.0},
            ("train.max_grad_norm is 1.0", "gradient_clipping is 2.0"),
        ),
        (
            {"weight_decay": 0.1},
            {"optimizer": {"type": "Adam", "params": {"weight_decay": 0.2}}},
            ("train.weight_decay is 0.1", "optimizer.params.weight_decay is 0.2"),
        ),
        (
            {"adam_beta2": 0.98},
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.999]}}},
            ("train.adam_beta2 is 0.98", "optimizer.params.betas[1] is 0.999"),
        ),
        (
            {"micro_batch_size": 4},
            {"train_micro_batch_size_per_gpu": 8},
            ("train.micro_batch_size is 4", "train_micro_batch_size_per_gpu is 8"),
        ),
        (
            {"global_batch_size": 16},
            {"train_batch_size": 32},
            ("train.global_batch_size is 16", "train_batch_size is 32"),
        ),
        (
            {"micro_batch_size": 4, "gradient_accumulation_steps": 3},
            {"train_batch_size": 32},
            ("train_batch_size must be train.micro_batch_size", "4 x 3 x 2 = 24, got 32"),
        ),
        (
            {"global_batch_size": 33},
            {},
            ("multiple of gradient_accumulation_steps x ranks = 1 x 2 = 2, got 33", "32 or 34"),
        ),
        (
            {"global_batch_size": 4, "micro_batch_size": 4},
            {},
            ("train.micro_batch_size x ranks = 4 x 2 = 8", "nearest: 8"),
        ),
        ({"precision": "fp32"}, {"bf16": {"enabled": True}}, ("train.precision is fp32", "bf16.enabled is true")),
        ({"precision": "bf16"}, {"bf16": {"enabled": False}}, ("train.precision is bf16", "bf16.enabled is false")),
        ({}, {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ("bf16.enabled and fp16.enabled are both true",)),
        (
            {"lr_scheduler_type": "cosine"},
            {"scheduler": {"type": "WarmupLR"}},
            ("train.lr_scheduler_type is cosine", "scheduler.type is WarmupLR"),
        ),
        ({}, {"gradient_clipping": "1"}, ("gradient_clipping must be a number or auto, got '1'",)),
        ({}, {"train_batch_size": 3.5}, ("train_batch_size must be a positive integer or auto, got 3.5",)),
    ],
)
def test_a_contradiction_names_both_fields_and_values(train: dict, deepspeed: dict, words: tuple[str, ...]) -> None:
    said = refusal(train, deepspeed)
    for word in words:
        assert word in said


def test_a_contradiction_names_the_deepspeed_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"gradient_clipping": 2.0}))
    assert "in " + str(tmp_path / "ds.json") in refusal({"max_grad_norm": 1.0}, str(tmp_path / "ds.json"))


@pytest.mark.parametrize(
    ("train", "deepspeed", "hardware", "precision"),
    [
        ({}, "zero2", CPU, "fp32"),
        ({}, "zero2", GPU, "bf16"),
        ({}, "zero2", OLD_GPU, "fp32"),
        ({}, {"fp16": {"enabled": True}}, GPU, "fp16"),
        ({}, {"bf16": {"enabled": False}}, GPU, "fp32"),
        ({}, {"bfloat16": {"enabled": True}}, CPU, "bf16"),
        ({"precision": "bf16"}, "zero2", CPU, "bf16"),
        ({"precision": "fp32"}, "zero2", GPU, "fp32"),
    ],
)
def test_precision_follows_run_then_json_then_hardware(
    train: dict, deepspeed: Any, hardware: Hardware, precision: str
) -> None:
    assert settled(train, deepspeed, hardware).precision == precision


@pytest.mark.parametrize(("precision", "hardware"), [("fp16", CPU), ("bf16", OLD_GPU)])
def test_a_precision_the_hardware_lacks_is_refused(precision: str, hardware: Hardware) -> None:
    assert f"train.precision on {hardware.device} must be one of" in refusal({"precision": precision}, {}, hardware)


def test_a_presets_scheduler_gives_way_to_the_runs_wish() -> None:
    assert settled({}, "zero2").lr_scheduler_type is None
    assert settled({"lr_scheduler_type": "linear"}, "zero2").lr_scheduler_type is None
    assert settled({"lr_scheduler_type": "cosine"}, "zero2").lr_scheduler_type == "cosine"
    assert settled({}, {}).lr_scheduler_type == "linear"


def test_warm_up_comes_from_steps_or_ratio_or_json() -> None:
    json_ = load_deepspeed({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}})
    nothing = load_deepspeed({})

    def train(**given_: Any) -> Any:
        return run_config({"train": given_}).train

    assert settle_warmup(train(warmup_steps=5), nothing, 100) == 5
    assert settle_warmup(train(warmup_ratio=0.1), nothing, 30) == 3
    assert settle_warmup(train(warmup_ratio=0.1), nothing, 31) == 4
    assert settle_warmup(train(warmup_ratio=0), nothing, 31) == 0
    assert settle_warmup(train(), json_, 100) == 7
    with pytest.raises(ConfigError, match=r"train.warmup_steps is 5 but scheduler.params.warmup_num_steps is 7"):
        settle_warmup(train(warmup_steps=5), json_, 100)
    with pytest.raises(ConfigError, match="at most the 4 steps of the run, got 5"):
        settle_warmup(train(warmup_steps=5), nothing, 4)


def test_an_unknown_preset_names_the_nearest() -> None:
    assert "did you mean 'zero2'?" in refusal({}, "zero22")
    assert "no file" in refusal({}, "nowhere/ds.json")


@pytest.mark.parametrize(
    ("deepspeed", "words"),
    [
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'?"),
        ({"gradient_acumulation_steps": 2}, "did you mean 'gradient_accumulation_steps'?"),
        ({"bf16": True}, "bf16 must be a mapping, got True"),
    ],
)
def test_a_misspelt_key_of_deepspeed_is_not_ignored(deepspeed: dict, words: str) -> None:
    assert words in refusal({}, deepspeed)
    assert load_deepspeed({"a_key_of_tomorrow": 1}).get("a_key_of_tomorrow") == 1


@pytest.mark.parametrize(
    ("kernel", "deepspeed", "said"),
    [
        ("reference", {"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0"),
        ("triton", "zero2_offload", "offloads the optimizer"),
        ("triton", "zero2", "optimizer.kernel must be auto, reference or deepspeed on the CPU, got triton"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, kernel: str, deepspeed: Any, said: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = run_config({"optimizer": {"kernel": kernel}, "deepspeed": deepspeed})
    with pytest.raises(ConfigError, match=r"optimizer\.kernel must be") as caught:
        settle(config, load_deepspeed(config.deepspeed), CPU)
    assert said in str(caught.value)
    settle(config, load_deepspeed("zero3"), GPU)
    settle(run_config({"optimizer": {"kernel": "auto"}, "deepspeed": deepspeed}), load_deepspeed(deepspeed), CPU)


def test_a_word_that_is_no_kernel_is_named() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.kernel must be one of auto, triton, reference, deepspeed"):
        run_config({"optimizer": {"kernel": "tritn"}})
