"""`progtuning plan --gpus N --memory SIZE`: what it prints, what it writes, and what is wrong with a request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from progtuning_ds.cli import main
from progtuning_ds.config import Hardware, load_deepspeed, load_run_config, settle
from progtuning_ds.memory import Budget, Request, search, setup_from_deepspeed


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    config = tf.LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=8000,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return str(folder)


def fit(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


SMALL = ("--gpus", "4", "--memory", "700MB", "--reserve", "0", "--seq-len", "256", "--global-batch", "32")


def test_a_proposal_fits_and_its_files_say_the_same(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = fit(capsys, "--model", llama, *SMALL, "--output", str(tmp_path / "out"))
    proposal = report["proposal"]
    assert code == 0
    assert report["fits"]
    for stage in proposal["stages"]:
        assert sum(stage["device_bytes"].values()) == stage["peak_bytes"] <= 700 * 10**6
        assert stage["micro_batch"] * stage["accumulation"] * 4 == 32
    folder = tmp_path / "out"
    assert json.loads((folder / "plan.json").read_text()) == report
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")
    config = load_run_config(folder / "run.yaml")
    assert config.train.global_batch_size == 32
    assert config.task.max_length == 256
    assert config.model.gradient_checkpointing == proposal["checkpointing"]
    assert config.memory.budget == 700 * 10**6
    sizes = [stage["micro_batch"] for stage in proposal["stages"]]
    assert config.memory.micro_batch_sizes == (sizes if len(set(sizes)) > 1 else None)
    source = load_deepspeed(config.deepspeed)
    settings = settle(config, source, Hardware(4, "cuda"))
    assert (settings.micro_batch_size, settings.gradient_accumulation_steps) == (
        sizes[0],
        proposal["stages"][0]["accumulation"],
    )
    written = json.loads((folder / "deepspeed.json").read_text())
    assert "auto" not in json.dumps(written)
    assert setup_from_deepspeed(written, 4).zero_stage == proposal["zero_stage"]


def test_quantized_frozen_blocks_leave_later_stages_more_and_reach_the_run_file(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--model", llama, *SMALL, "--output")
    _, kept = fit(capsys, *asked, str(tmp_path / "kept"))
    code, report = fit(capsys, *asked, str(tmp_path / "out"), "--on-freeze", "nf4")
    assert code == 0
    weights = [stage["device_bytes"]["weights"] for stage in report["proposal"]["stages"]]
    quantized = [stage["device_bytes"].get("quantized_weights", 0) for stage in report["proposal"]["stages"]]
    assert weights[0] == kept["proposal"]["stages"][0]["device_bytes"]["weights"]
    assert weights == sorted(set(weights), reverse=True)
    assert 0 == quantized[0] < quantized[1] < quantized[2]
    for gone, held in zip(weights[1:], quantized[1:], strict=True):
        assert 0.25 < held / (weights[0] - gone) < 0.27, "of 16 bits a weight 4, and 1/64 byte of scales"
    assert load_run_config(tmp_path / "out" / "run.yaml").schedule.on_freeze == "nf4"


def test_what_deepspeed_gets_is_the_engine_that_was_counted(llama: str, tmp_path: Path) -> None:
    from progtuning_ds.cli.fit import Fit
    from progtuning_ds.cli.fit_files import write_fit
    from progtuning_ds.cli.plan import PlanRequest, make_report

    asked = PlanRequest(model=llama, epochs="3")
    report = make_report(asked)
    for gpus, megabytes in ((1, 2000), (4, 500), (8, 250)):
        request = Request(gpus, Budget(megabytes * 10**6), 256, 32)
        outcome = search(report.workload, request)
        assert outcome.proposal is not None
        folder = tmp_path / str(gpus)
        write_fit(Fit(report, request, outcome, (), ()), asked, folder)
        written = json.loads((folder / "deepspeed.json").read_text())
        assert setup_from_deepspeed(written, gpus, kernel=outcome.proposal.choice.kernel) == outcome.proposal.setup


def test_the_table_explains_what_was_chosen(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = fit(capsys, "--model", llama, *SMALL)
    assert main(["plan", "--model", llama, *SMALL]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "4 GPU(s) of 667.6 MiB" in text
    assert "Cheapest that fits every stage: ZeRO-" in text
    for stage in report["proposal"]["stages"]:
        assert f"{stage['micro_batch']} x {stage['accumulation']}" in text


MODELS = {
    "causal_lm": tf.GPT2Config(n_layer=3, n_embd=32, n_head=2, architectures=["GPT2LMHeadModel"]),
    "classification": tf.DistilBertConfig(n_layers=3, dim=32, n_heads=2, architectures=["DistilBertForMaskedLM"]),
    "squad": tf.BertConfig(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=2, architectures=["BertForQuestionAnswering"]
    ),
    "token_classification": tf.BertConfig(
        num_hidden_layers=3, hidden_size=32, num_attention_heads=2, architectures=["BertForTokenClassification"]
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_run_file_has_the_task_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    MODELS[kind].save_pretrained(tmp_path)
    name = str(tmp_path / "config.json")
    code, report = fit(capsys, "--model", name, "--gpus", "2", "--memory", "8GB", "--output", str(tmp_path / "out"))
    assert code == 0
    assert not report["notes"] or "counted by the nearest pattern" in report["notes"][0]
    config = load_run_config(tmp_path / "out" / "run.yaml")
    assert config.task.kind == kind
    assert config.task.max_length == 512
    assert config.model.path == str(tmp_path)


def test_a_model_that_the_program_has_no_task_for_gets_no_run_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tf.T5Config(num_layers=2, d_model=32, d_ff=64, num_heads=2, architectures=["T5ForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    out = tmp_path / "out"
    _, report = fit(capsys, "--model", str(tmp_path), "--gpus", "1", "--memory", "8GB", "--output", str(out))
    assert "The training program has no task for seq2seq-lm: --output writes no run.yaml" in report["notes"][-1]
    assert sorted(path.name for path in out.iterdir()) == ["deepspeed.json", "memory.png", "plan.json"]


def test_nothing_fits_says_what_was_tried_and_what_would(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tight = ("--gpus", "1", "--memory", "200MB", "--host-memory", "200MB", "--reserve", "0", "--seq-len", "1024")
    code, report = fit(capsys, "--model", llama, *tight, "--output", str(tmp_path))
    assert code == 1
    assert not report["fits"]
    assert report["failures"]
    assert report["remedies"]
    assert not (tmp_path / "run.yaml").exists()
    assert main(["plan", "--model", llama, *tight]) == 1
    text = capsys.readouterr().out
    assert "Nothing fits." in text
    assert "What would fit:" in text


WRONG = [
    ("--gpus 4", "--memory must be given together with --gpus"),
    ("--memory 24GB", "--gpus must be given together with --memory"),
    ("--epochs 3 --output x", "--output needs --gpus and --memory"),
    ("--gpus 4 --memory 24", "memory must be above the reserve"),
    ("--gpus 4 --memory 24XB", "did you mean"),
    ("--gpus 0 --memory 24GB", "gpus must be a positive whole number, got 0"),
    ("--gpus 4 --memory 24GB --global-batch 6", "got 6; nearest: 4 or 8"),
    ("--gpus 4 --memory 24GB --seq-len 4096", "seq_len must be at most the 2048 positions of the model, got 4096"),
    ("--gpus 4 --memory 24GB --attention flesh", "did you mean 'flash'?"),
    ("--gpus 4 --memory 24GB --kernel fuse", "did you mean 'fused'?"),
    ("--gpus 4 --memory 24GB --on-freeze nf5", "did you mean 'nf4'?"),
    (
        "--gpus 4 --memory 24GB --on-freeze nf4 --stages 1",
        "on_freeze must be keep here, got 'nf4': no block of the plan",
    ),
    ("--gpus 4 --memory 24GB --epochs 2.5 --output x", "epochs must be a whole number"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[arguments for arguments, _ in WRONG])
def test_a_mistake_gets_one_line_and_code_2(
    llama: str, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    assert main(["plan", "--model", llama, *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("progtuning: error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
