"""`progtuning plan` as a user meets it: numbers, tables, JSON and one line for every mistake."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from progtuning_ds import __version__
from progtuning_ds.cli import main

TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def write(folder: Path, config: tf.PretrainedConfig, **extra: Any) -> str:
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return str(folder)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return write(tmp_path / "tiny", tf.BertConfig(**TINY))


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.mark.parametrize(
    ("sizes", "full", "progtuning"),
    [({}, 328_451_334, 243_396_870), (BERT_LARGE, 1_005_431_814, 703_122_438)],
    ids=["base", "large"],
)
def test_bert_gives_the_papers_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: dict[str, int], full: int, progtuning: int
) -> None:
    report = plan(capsys, "--model", write(tmp_path, tf.BertConfig(**sizes)), "--epochs", "3")
    layers = sizes.get("num_hidden_layers", 12)
    third = layers // 3
    assert report["num_blocks"] == layers
    assert report["parts"] == [list(range(i * third, (i + 1) * third)) for i in range(3)]
    assert [stage["index"] for stage in report["stages"]] == [0, 1, 2]
    assert [stage["trainable_blocks"] for stage in report["stages"]] == [
        list(range(i * third, layers)) for i in range(3)
    ]
    assert [stage["epochs"] for stage in report["stages"]] == [1, 1, 1]
    assert report["updated_params_full"] == full
    assert report["updated_params"] == progtuning == sum(stage["trainable_params"] for stage in report["stages"])
    assert report["saving"] == pytest.approx(1 - progtuning / full)


@pytest.mark.parametrize(("epochs", "percent"), [("3", 26), ("2", 20)])
def test_squad_heads_save_what_the_paper_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], epochs: str, percent: int
) -> None:
    model = write(tmp_path, tf.BertConfig(), architectures=["BertForQuestionAnswering"])
    report = plan(capsys, "--model", model, "--epochs", epochs)
    assert report["head"] == "question-answering"
    assert round(100 * report["saving"]) == percent


@pytest.mark.timeout(60)
def test_a_70b_model_needs_no_weights_no_memory_and_no_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tf.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    model = write(tmp_path, config, architectures=["LlamaForCausalLM"], _attn_implementation="flash_attention_2")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    report = plan(capsys, "--model", model, "--epochs", "2", "--stages", "4", "--embeddings", "never")
    assert report["components"]["blocks"] == [855_654_400] * 80
    assert report["updated_params_full"] == 2 * 70_553_706_496
    embeddings, norm = 128256 * 8192, 8192
    assert [stage["trainable_params"] for stage in report["stages"]] == [
        855_654_400 * blocks + embeddings + norm for blocks in (80, 60, 40, 20)
    ]
    assert [stage["epochs"] for stage in report["stages"]] == [0.5] * 4


@pytest.mark.parametrize("embeddings", ["always", "first_stage", "never"])
def test_embedding_options_count_as_the_model_does(
    tiny: str, capsys: pytest.CaptureFixture[str], embeddings: str
) -> None:
    report = plan(capsys, "--model", tiny, "--epochs", "2", "--embeddings", embeddings)
    model = tf.BertForSequenceClassification(tf.BertConfig.from_pretrained(tiny))
    sizes = {
        "embeddings": sum(p.numel() for p in model.bert.embeddings.parameters()),
        "low": sum(p.numel() for block in model.bert.encoder.layer[:2] for p in block.parameters()),
        "all": sum(p.numel() for p in model.parameters()),
    }
    frozen = {
        "always": [0, sizes["low"]],
        "first_stage": [0, sizes["low"] + sizes["embeddings"]],
        "never": [sizes["embeddings"], sizes["low"] + sizes["embeddings"]],
    }[embeddings]
    assert [stage["trainable_params"] for stage in report["stages"]] == [sizes["all"] - count for count in frozen]
    assert report["updated_params_full"] == 2 * sizes["all"]


def test_the_file_itself_and_its_folder_are_the_same(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    by_folder = plan(capsys, "--model", tiny, "--epochs", "1")
    by_file = plan(capsys, "--model", f"{tiny}/config.json", "--epochs", "1")
    assert {**by_file, "model": ""} == {**by_folder, "model": ""}


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [
        (("--epochs", "3", "--stages", "2"), [1.5, 1.5]),
        (("--epochs", "2.5"), [2.5 / 3] * 3),
        (("--epochs", "3", "--stage-lengths", "1,0.5,1.5"), [1, 0.5, 1.5]),
        (("--epochs", "4", "--stage-lengths", "0.5,0.25,0.25", "--length-unit", "fractions"), [2, 1, 1]),
        (("--epochs", "1", "--stage-lengths", "1/3,1/3,1/3", "--length-unit", "fractions"), [1 / 3] * 3),
    ],
)
def test_stage_lengths(
    tiny: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], epochs: list[float]
) -> None:
    report = plan(capsys, "--model", tiny, *arguments)
    assert [stage["epochs"] for stage in report["stages"]] == pytest.approx(epochs)
    updated = sum(stage["trainable_params"] * length for stage, length in zip(report["stages"], epochs, strict=True))
    assert report["updated_params"] == round(updated)


HEADS = [
    (tf.BertConfig, None, "sequence-classification", "BertForSequenceClassification"),
    (tf.BertConfig, "BertForMaskedLM", "sequence-classification", "BertForSequenceClassification"),
    (tf.BertConfig, "BertForTokenClassification", "token-classification", "BertForTokenClassification"),
    (tf.GPT2Config, "GPT2LMHeadModel", "causal-lm", "GPT2LMHeadModel"),
    (tf.T5Config, "T5ForConditionalGeneration", "seq2seq-lm", "T5ForConditionalGeneration"),
    (tf.ViTConfig, None, "image-classification", "ViTForImageClassification"),
]


@pytest.mark.parametrize(("config", "architecture", "head", "built"), HEADS)
def test_the_head_is_that_of_the_architecture_else_a_classifier(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: type[tf.PretrainedConfig],
    architecture: str | None,
    head: str,
    built: str,
) -> None:
    extra = {"architectures": [architecture]} if architecture else {}
    report = plan(capsys, "--model", write(tmp_path, config(), **extra), "--epochs", "2")
    assert (report["head"], report["architecture"]) == (head, built)


def test_head_labels_blocks_and_always_train_can_be_chosen(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    two = plan(capsys, "--model", tiny, "--epochs", "1")
    five = plan(capsys, "--model", tiny, "--epochs", "1", "--num-labels", "5")
    assert five["components"]["head"] - two["components"]["head"] == 3 * (16 + 1)
    masked = plan(capsys, "--model", tiny, "--epochs", "1", "--head", "masked-lm")
    assert masked["architecture"] == "BertForMaskedLM"
    named = plan(capsys, "--model", tiny, "--epochs", "1", "--blocks", "bert.encoder.layer")
    assert named == two
    norms = plan(capsys, "--model", tiny, "--epochs", "2", "--always-train", "*LayerNorm*")
    plain = plan(capsys, "--model", tiny, "--epochs", "2")
    gained = norms["stages"][1]["trainable_params"] - plain["stages"][1]["trainable_params"]
    assert gained == 2 * 2 * 2 * 16  # two frozen blocks, two norms each, weight and bias


def test_the_table_shows_every_stage_and_the_saving(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = plan(capsys, "--model", tiny, "--epochs", "2", "--embeddings", "first_stage")
    assert main(["plan", "--model", tiny, "--epochs", "2", "--embeddings", "first_stage"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if re.match(r"\d/\d", line)]
    assert [row[:3] for row in rows] == [["1/2", "0-3", "train"], ["2/2", "2-3", "frozen"]]
    assert [row[3] for row in rows] == [f"{stage['trainable_params']:,}" for stage in report["stages"]]
    words = " ".join(text.split())
    assert f"{report['updated_params']:,} parameters instead of {report['updated_params_full']:,}" in words
    assert f"saves {report['saving']:.1%}" in words


def bad_file(folder: Path, content: str) -> str:
    path = folder / "broken.json"
    path.write_text(content)
    return str(path)


WRONG = [
    ("{tiny} --epochs 0", "epochs must be a positive number, got '0'"),
    ("{tiny} --epochs three", "epochs must be a positive number, got 'three'"),
    ("{tiny} --epochs nan", "epochs must be a positive number, got 'nan'"),
    ("{tiny} --epochs 5", "num_stages must be at most the number of blocks, got 5 stages for 4 blocks"),
    ("{tiny} --epochs 3 --stages 0", "num_stages must be a positive whole number, got 0"),
    ("{tiny} --epochs 3 --stages x", "--stages"),
    ("{tiny} --epochs 3 --stags 2", "--stages"),
    ("{tiny}", "--epochs"),
    ("{tiny} --epochs 3 --embeddings allways", "did you mean 'always'?"),
    ("{tiny} --epochs 3 --head classification", "head must be one of sequence-classification"),
    ("{tiny} --epochs 3 --head image-classification", "head must be one that bert models have"),
    ("{tiny} --epochs 3 --num-labels 0", "num_labels must be a positive whole number, got 0"),
    ("{tiny} --epochs 3 --num-labels 2 --head causal-lm", "num_labels is for sequence-classification"),
    ("{tiny} --epochs 3 --blocks bert.encoder.layers", "did you mean 'bert.encoder.layer'?"),
    ("{tiny} --epochs 3 --always-train *norm*", "always_train[0] must match a parameter name, got '*norm*'"),
    ("{tiny} --epochs 3 --stage-lengths 1,1", "lengths must add up to 3 epochs, got 1 + 1 = 2"),
    ("{tiny} --epochs 3 --stage-lengths 1,,2", "stage_lengths[1] must be a positive number, got ''"),
    ("{tiny} --epochs 3 --stage-lengths 3 --length-unit steps", "length_unit must be one of epochs, fractions"),
    ("{tiny}x --epochs 3", "which does not exist; did you mean 'tiny'?"),
    ("{folder} --epochs 3", "got '{folder}', which has none"),
    ("nobody/nothing --epochs 3", "or a hub id that can be reached, got 'nobody/nothing'"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[arguments for arguments, _ in WRONG])
def test_a_mistake_gets_one_line_and_code_2(
    tiny: str, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    folder = str(Path(tiny).parent)
    arguments, words = (text.replace("{tiny}", tiny).replace("{folder}", folder) for text in (arguments, words))
    assert_one_line(capsys, main(["plan", "--model", *arguments.split()]), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "model must have a config.json in JSON"),
        ("[]", "model_type in"),
        ('{"model_type": "brt"}', "did you mean 'bert'?"),
        ('{"model_type": "bert", "hidden_size": "x"}', "hidden_size"),
        (
            '{"model_type": "bert", "hidden_size": 30}',
            "model cannot be built from its bert config: The hidden size (30)",
        ),
        ('{"model_type": "albert"}', "layers that share weights cannot freeze one by one"),
    ],
)
def test_a_broken_config_gets_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    assert_one_line(capsys, main(["plan", "--model", bad_file(tmp_path, content), "--epochs", "1"]), words)


def assert_one_line(capsys: pytest.CaptureFixture[str], code: int, words: str) -> None:
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("progtuning: error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(capsys, main(["pla"]), "'pla'")


def test_version_and_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"progtuning {__version__}\n"
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        assert "progtuning plan --model PATH_OR_ID --epochs 3" in capsys.readouterr().out
    assert main(["plan", "--help"]) == 0
    help_text = capsys.readouterr().out
    assert "Examples" in help_text
    assert "--stage-lengths 1,0.5,1.5" in help_text


def run_fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_planning_loads_no_deepspeed_and_help_no_torch(tiny: str) -> None:
    code = f"""
import sys
from progtuning_ds.cli import main
main(["--version"])
main(["plan", "--help"])
assert not {{"torch", "transformers"}} & set(sys.modules)
assert main(["plan", "--model", {tiny!r}, "--epochs", "2", "--json"]) == 0
assert "torch" in sys.modules
assert "deepspeed" not in sys.modules
"""
    done = run_fresh(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_process_ends_with_the_code_of_the_command(tiny: str) -> None:
    command = [sys.executable, "-m", "progtuning_ds.cli", "plan", "--model", tiny, "--epochs"]
    good, bad = (subprocess.run([*command, n], capture_output=True, text=True, check=False) for n in ("2", "-2"))
    assert (good.returncode, bad.returncode) == (0, 2)
    assert bad.stderr.count("\n") == 1
