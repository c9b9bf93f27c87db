"""The report of a run: complete, readable alone, and true to the records."""

from __future__ import annotations

import re
from pathlib import Path

from progtuning_ds.train.records import (
    EvaluationRecord,
    MemoryRecord,
    RecordLog,
    RunRecord,
    StageRecord,
    StepRecord,
)
from progtuning_ds.train.report import write_report

MIB = 2**20


def write_run(folder: Path, stages: int, device: str) -> None:
    """Records of a made-up run, with characters that a page must escape."""
    log = RecordLog(folder)
    for step in range(4 * stages):
        log.write(StepRecord(step, (step + 1) / 4, step // 4, 2 / (step + 1), 1e-4, 1.0, 0.1, 120.0 + step, 10 * MIB))
    for stage in range(stages):
        scores = {"accuracy": 0.5 + stage / 10}
        log.write(EvaluationRecord(4 * stage + 3, stage + 1, stage, "validation", ("epoch",), 10, scores, 0.1))
        held = {"weights": 10 * MIB, "master_weights": 20 * MIB, "exp_avg": 5 * MIB, "exp_avg_sq": 5 * MIB}
        released = {"exp_avg": MIB} if stage else {}
        log.write(
            StageRecord(
                stage, 4 * stage, 4, (stage,), True, 1_234_567 - stage, held, (30 * MIB, 30 * MIB), released, 0, 0.004,
                2.0, 16.0, scores,
            )
        )  # fmt: skip
        log.write(
            MemoryRecord(
                stage, 4 * stage + 3, 2 + stage, 3, held | {"activations": 7 * MIB}, {}, 47 * MIB, held, 51 * MIB, 0,
                99 * MIB, 64 * MIB, 8 * MIB, stage == 1,
            )
        )  # fmt: skip
    log.write(
        RunRecord(
            "progtuning", 2, device, 2, "bf16", 4 * stages, 3_000_000, 4_000_000, 0.25, 60.0, "accuracy",
            {"validation": {"accuracy": 0.7}}, {"torch": "<2.13>"},
        )
    )  # fmt: skip


def test_the_page_needs_nothing_else_and_says_what_the_records_say(tmp_path: Path) -> None:
    write_run(tmp_path, 3, "cuda")
    page = write_report(tmp_path).read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 6
    for words in ("25.0% saved", "1,234,565", "3 x 3 (fell back)", "51.0 MiB", "47.0 MiB", "&lt;2.13&gt;", "0.7000"):
        assert words in page
    assert "Budget per rank: 64.0 MiB" in page
    pictures = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert pictures == [
        "memory_by_stage.png",
        "quality.png",
        "throughput.png",
        "training_loss.png",
        "transitions.png",
        "updated_parameters.png",
    ]
    assert all((tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_run_of_one_stage_has_no_transitions(tmp_path: Path) -> None:
    write_run(tmp_path, 1, "cpu")
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "of the whole process" in page
    assert "<th>Process peak</th>" in page


def test_the_page_names_model_task_and_data(tmp_path: Path) -> None:
    write_run(tmp_path, 2, "cuda")
    (tmp_path / "config.yaml").write_text("model: {path: a <b>}\ndata: {train_file: rows.csv}\nmethod: {kind: lora}\n")
    page = write_report(tmp_path).read_text()
    assert "Model a &lt;b&gt; with lora, task classification, trained on rows.csv. Trained on 2 rank(s)" in page
