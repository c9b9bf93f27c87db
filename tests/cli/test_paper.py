"""`progtuning paper`: first principles beside the published numbers."""

from __future__ import annotations

import json

import pytest

from progtuning_ds.cli import main


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    from progtuning_ds.cli.paper import paper_rows, show_paper

    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", printed.append)
        show_paper(paper_rows(), as_json=True)
    return json.loads(printed[0])


def test_full_fine_tuning_comes_out_exactly(rows: list[dict]) -> None:
    base, large, squad, squad2 = rows[:4]
    assert (base["full"], base["progtuning"]) == (328_451_334, 243_396_870)
    assert (large["full"], large["progtuning"]) == (1_005_431_814, 703_122_438)
    assert round(100 * squad["saving"]) == 26
    assert round(100 * squad2["saving"]) == 20
    for row in (base, large):
        for count, published in (
            (row["full"], row["published_full"]),
            (row["progtuning"], row["published_progtuning"]),
        ):
            digits = len(published.split(".")[1]) - 1 if "." in published else 0
            assert f"{count / 1e6:.{digits}f}M" == published


def test_the_verdict_follows_from_the_figures(rows: list[dict]) -> None:
    from progtuning_ds.cli import paper

    assert [row["verdict"] for row in rows[:4]] == ["agrees"] * 4
    reduction, left = (row["verdict"].partition(";")[0] for row in rows if "Adapter" in row["setting"])
    assert (reduction, left) == ("differs", "agrees")
    close = paper.PaperRow("", "", 328_451_334, 243_396_870, "328.5M", "243.3M", "")
    assert paper._verdict(close) == "differs"


def test_both_readings_of_the_adapter_row_are_printed(rows: list[dict]) -> None:
    reduction, left = (row for row in rows if "Adapter" in row["setting"])
    per_block = 2 * (2 * 768 * 48 + 48 + 768)
    assert reduction["full"] == left["full"] == 20 * 12 * per_block == 35_781_120
    assert reduction["full"] - reduction["progtuning"] == left["progtuning"] == 11_927_040
    assert reduction["progtuning"] == 23_854_080
    assert reduction["plan"] != left["plan"]


def test_what_is_not_published_is_not_made_up(rows: list[dict]) -> None:
    for row in rows:
        if "BitFit" in row["setting"] or "LoRA" in row["setting"]:
            assert row["published_full"] is row["published_progtuning"] is None
    lora = [row for row in rows if "LoRA" in row["setting"]]
    assert {row["full"] for row in lora} == {20 * 12 * 2 * 2 * 768 * 8}


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper"]) == 0
    printed = capsys.readouterr().out
    assert "243,396,870" in printed
    assert "agrees" in printed
