"""The command line: mistakes end in one line and exit code 2 before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from progtuning_ds.config.problems import field_names
from progtuning_ds.config.schema import RunConfig
from progtuning_ds.train.cli import main, parse

LAUNCHED = Path(__file__).resolve().parents[2] / "launch" / "train.py"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config", "demo", "train.epoch=2"], "train.epoch is not a known field; did you mean 'train.epochs'?"),
        (["--confg", "demo"], "--confg is not a known argument; did you mean '--config'?"),
        (["train.epochs=2"], "--config must be given"),
        (["--config", "nowhere.yaml"], "--config must be a file or one of"),
        (["--config", "demo", "overwrite=maybe"], "overwrite must be true or false, got 'maybe'"),
        (["--config"], "--config"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")
    assert words in said.err


def test_settings_are_checked_before_torch_is_loaded() -> None:
    code = (
        "import sys; from progtuning_ds.train.cli import main; code = main(sys.argv[1:]);"
        "loaded = {'torch', 'deepspeed', 'transformers'} & set(sys.modules); sys.exit(f'{code} {loaded}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", "demo", "train.epochs=0"], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines() == ["error: train.epochs must be greater than or equal to 1, got 0", "2 set()"]


def test_a_run_in_the_way_is_told_before_torch_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "steps.jsonl").write_text("")
    assert main(["--config", "demo", f"output_dir={tmp_path}"]) == 2
    assert "already holds a run; give --overwrite, or output_dir=" in capsys.readouterr().err


def test_arguments_mix_with_overrides_and_the_launchers_rank() -> None:
    config, args = parse(["--local_rank=1", "train.epochs=2", "--config", "demo", "--compare", "overwrite=true"])
    assert config.train.epochs == 2
    assert (args.compare, args.overwrite) == (True, True)
    assert not parse(["--config", "demo"])[1].overwrite
    assert parse(["--config", "demo", "--overwrite"])[1].overwrite


def test_help_lists_every_setting_and_the_shipped_configurations() -> None:
    done = subprocess.run([sys.executable, str(LAUNCHED), "--help"], capture_output=True, text=True, check=True)
    for name in field_names(RunConfig):
        assert name.rpartition(".")[2] in done.stdout, name
    assert "demo" in done.stdout
    assert "--compare" in done.stdout
