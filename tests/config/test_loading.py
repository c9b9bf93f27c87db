"""A configuration loads whole or says in one line what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from progtuning_ds.config import RunConfig, load_run_config, reference, run_config, save_run_config
from progtuning_ds.config.files import SHIPPED, parse_value, shipped_names
from progtuning_ds.config.loading import apply_override
from progtuning_ds.config.problems import field_names
from progtuning_ds.errors import ConfigError


def message(settings: dict, *overrides: str) -> str:
    def load() -> None:
        for override in overrides:
            apply_override(settings, override)
        run_config(settings)

    with pytest.raises(ConfigError) as caught:
        load()
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_configuration_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    config = load_run_config(name)
    save_run_config(config, tmp_path / "saved.yaml")
    assert load_run_config(tmp_path / "saved.yaml") == config


def test_the_demo_is_shipped() -> None:
    assert "demo" in shipped_names()
    assert (SHIPPED / "demo.yaml").is_file()


def test_a_configuration_with_every_kind_of_value_round_trips(tmp_path: Path) -> None:
    config = run_config(
        {
            "deepspeed": {"zero_optimization": {"stage": 1}},
            "schedule": {
                "stage_lengths": [0.5, 1, 1.5],
                "always_train": ["*LayerNorm*"],
                "stages": [{"blocks": "0-3", "steps": 3}],
            },
            "train": {"learning_rate": 1e-5, "group_by_length": False},
            "output_dir": "läufe/1",
        }
    )
    save_run_config(config, tmp_path / "saved.yaml")
    assert load_run_config(tmp_path / "saved.yaml") == config


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    settings = {"train": {"epochs": 2, "learning_rate": 3e-4}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert load_run_config(tmp_path / "run.json") == load_run_config(tmp_path / "run.yaml")


def test_overrides_are_typed_as_yaml_and_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {epochs: 5, seed: 7}\nschedule:\n")
    overrides = [
        "train.epochs=2",
        "train.learning_rate=1e-4",
        "schedule.num_stages=2",
        "schedule.stage_lengths=[1, 1]",
        "model.gradient_checkpointing=true",
        "deepspeed.zero_optimization.stage=3",
        "data.source=a=b",
        "task.max_length=null",
    ]
    config = load_run_config(tmp_path / "run.yaml", overrides)
    assert (config.train.epochs, config.train.seed, config.train.learning_rate) == (2, 7, 1e-4)
    assert (config.schedule.num_stages, config.schedule.stage_lengths) == (2, [1, 1])
    assert config.model.gradient_checkpointing is True
    assert config.deepspeed == {"zero_optimization": {"stage": 3}}
    assert config.data.source == "a=b"
    assert config.task.max_length is None


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("5E+3", 5000.0), ("1.5e2", 150.0), ("-2e-3", -2e-3)])
def test_exponents_are_numbers_with_and_without_a_point(text: str, value: float) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rte=1", "train.learning_rte is not a known field; did you mean 'train.learning_rate'?"),
        ("learning_rate=1", "learning_rate is not a known field; did you mean 'train.learning_rate'?"),
        ("trian.epochs=1", "trian is not a known field; did you mean 'train'?"),
        ("train.lr=1", "did you mean 'train.learning_rate'?"),
        ("train.per_device_train_batch_size=1", "did you mean 'train.micro_batch_size'?"),
        ("data.text_column=text", "did you mean 'task.text_column'?"),
        ("train.zzz=1", "train.zzz is not a known field"),
        ("train.precision=bf61", "must be one of auto, bf16, fp16, fp32, got 'bf61'; did you mean 'bf16'?"),
        ("schedule.embeddings=firststage", "did you mean 'first_stage'?"),
        ("train.epochs=0", "train.epochs must be greater than or equal to 1, got 0"),
        ("train.epochs=true", "train.epochs must be a valid integer, got True"),
        ("train.epochs=1.5", "train.epochs must be a valid integer, got 1.5"),
        ("train.learning_rate=-1", "train.learning_rate must be greater than 0, got -1"),
        ("train.learning_rate=.nan", "train.learning_rate must be a finite number"),
        ("train.warmup_ratio=2", "train.warmup_ratio must be less than or equal to 1, got 2"),
        ("schedule.stage_lengths=[1, x]", "schedule.stage_lengths[1] must be a valid number, got 'x'"),
        ("schedule.always_train=bias", "schedule.always_train must be a valid list, got 'bias'"),
        ("model.gradient_checkpointing=1", "must be a valid boolean, got 1"),
        ("train=3", "train must be a section with fields of its own, got 3"),
        ("deepspeed=3", "deepspeed must be a preset's name, the path of a JSON file or a mapping, got 3"),
        ("train.epochs", "an override must look like train.epochs=2, got 'train.epochs'"),
        (".epochs=2", "an override must look like train.epochs=2"),
        ("train.epochs=[", "train.epochs must be a YAML value, got '['"),
        ("output_dir.name=x", "output_dir.name cannot be set: output_dir is 'runs/run', not a mapping"),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_what_is_allowed(override: str, words: str) -> None:
    said = message({"output_dir": "runs/run"}, override)
    assert words in said
    assert "\n" not in said


def test_several_mistakes_are_one_line_each() -> None:
    said = message({"train": {"epochs": 0, "seeed": 1}, "modle": {}})
    assert sorted(line.split()[0] for line in said.splitlines()) == ["modle", "train.epochs", "train.seeed"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": {"source": "a", "train_file": "b.csv"}}, ("data.source is 'a'", "data.train_file is 'b.csv'")),
        ({"data": {"validation_file": "v.csv"}}, ("data.validation_file is 'v.csv'", "data.train_file is not set")),
        (
            {"data": {"validation_fraction": 0.1, "validation_split": "dev"}},
            ("data.validation_fraction is 0.1", "data.validation_split is 'dev'"),
        ),
        ({"train": {"warmup_steps": 3, "warmup_ratio": 0.1}}, ("train.warmup_steps is 3", "train.warmup_ratio is 0.1")),
    ],
)
def test_fields_that_exclude_each_other_are_both_named(settings: dict, words: tuple[str, str]) -> None:
    said = message(settings)
    assert all(word in said for word in words)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", "train: [", "cannot read"),
        ("a.json", "{", "cannot read"),
        ("a.yaml", "- 1", "must hold a mapping, got list"),
        ("a.yaml", "train: {epochs: 1, epochs: 2}", "'epochs' is given twice"),
        ("a.yaml", "1: 2", "1 is not a name of a section or field"),
        ("a.yaml", b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest_file_or_shipped_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"did you mean 'mine.yaml'"):
        load_run_config(tmp_path / "mien.yaml")
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load_run_config("dmeo")


def test_an_empty_file_is_the_default_run(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_run_config(tmp_path / "empty.yaml") == RunConfig()


def test_the_reference_explains_every_field() -> None:
    text = reference()
    for name in field_names(RunConfig):
        assert name.rpartition(".")[2] in text, name
    assert "None" not in text, "a field without a docstring"
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"budget": "24XB"}, "memory.budget must have one of the units"),
        ({"budget": "a lot"}, "memory.budget must be a positive size such as 24GB"),
        ({"budget": "1GB", "reserve": "2GB"}, "memory.reserve must be below memory.budget '1GB', got '2GB'"),
        ({"reinvest": "micro_batch"}, "memory.reinvest is micro_batch but memory.budget is not set"),
        (
            {"reinvest": "micro_batch", "budget": "1GB", "micro_batch_sizes": [1, 2]},
            "memory.micro_batch_sizes is [1, 2]; give one of them",
        ),
        ({"reinvest": "unoffload", "budget": "1GB"}, "memory.host_state is none"),
        ({"reinvest": "microbatch"}, "did you mean 'micro_batch'?"),
    ],
)
def test_a_wrong_memory_section_gets_one_line(memory: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config({"memory": memory})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
