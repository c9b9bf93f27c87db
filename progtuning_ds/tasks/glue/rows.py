"""Loads GLUE's rows: from the hub, a saved folder, the official files, or one's own. No torch, no deepspeed."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

from datasets import Dataset, DatasetDict

from progtuning_ds.config import DataConfig
from progtuning_ds.errors import ConfigError
from progtuning_ds.tasks.glue.specs import GlueSpec
from progtuning_ds.tasks.sources import Split, load_named, load_splits

logger = logging.getLogger(__name__)

_FILES = {"train": "train", "validation": "dev", "test": "test"}


def load_rows(data: DataConfig, name: str, spec: GlueSpec, seed: int) -> dict[str, Split]:
    """Load every split there is, by the hub's names: train, validation (or validation_matched, ...), test.

    Args:
        data: `source` may be a hub id, a folder of `save_to_disk`, or a folder with the official tsv files; without
            any, it is `nyu-mll/glue`. `train_file` and its like may be files of one's own with the hub's columns.
        name: the task, `mnli`.
        spec: what it is.
        seed: seed of the draw where rows are held out or limited.

    Raises:
        ConfigError: if something is missing, unreadable or empty.
    """
    if data.train_file:
        splits = load_splits(data, seed)
        test = {} if splits.test is None else {"test": splits.test}
        suffix = "_matched" if len(spec.submission) > 1 else ""
        return {"train": splits.train, f"validation{suffix}": splits.evaluation, **test}
    source = data.source or "nyu-mll/glue"
    folder = Path(source).expanduser()
    if (folder / "train.tsv").is_file():
        found, where = _official(folder, spec), str(folder)
    else:
        is_saved = (folder / "dataset_dict.json").is_file()
        if folder.is_dir() and not is_saved:
            raise ConfigError(f"data.source: {source!r} holds no train.tsv, and is no folder of save_to_disk")
        found, where = load_named(source, data.config_name or (None if is_saved else name)), source
    splits = {split: Split(rows, f"split {split!r} of {where}") for split, rows in found.items()}
    for split in splits.values():
        if len(split.rows) == 0:
            raise ConfigError(f"data: {split.name} holds no rows")
    for needed in ("train", "validation" if len(spec.submission) == 1 else "validation_matched"):
        if needed not in splits:
            raise ConfigError(f"data: {where} has no split {needed!r}, which {name} needs; it has {', '.join(splits)}")
    return {key: _limited(split, data, key, seed) for key, split in splits.items()}


def _limited(split: Split, data: DataConfig, name: str, seed: int) -> Split:
    most = data.max_train_samples if name == "train" else data.max_eval_samples if "validation" in name else None
    if most is None or most >= len(split.rows):
        return split
    return Split(split.rows.shuffle(seed=seed).select(range(most)), split.name)


def _official(folder: Path, spec: GlueSpec) -> DatasetDict:
    found = {}
    for path in sorted(folder.glob("*.tsv")):
        stem, _, part = path.stem.partition("_")
        names = {file: split for split, file in _FILES.items()}
        if stem in names and part in ("", "matched", "mismatched"):
            split = names[stem] + (f"_{part}" if part else "")
            found[split] = _read(path, spec, labelled=stem != "test")
    return DatasetDict(found)


def _read(path: Path, spec: GlueSpec, *, labelled: bool) -> Dataset:
    with path.open(encoding="utf-8", newline="") as file:
        # The files quote nothing: a quotation mark is one.
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not lines:
        raise ConfigError(f"data: {path} holds no rows")
    has_header = not (spec.header and labelled)
    header = lines[0] if has_header else list(spec.header)
    header[0] = header[0].removeprefix("\ufeff")
    wanted = {theirs: ours for theirs, ours in spec.official.items() if labelled or ours != "label"}
    for theirs in wanted:
        if theirs not in header:
            raise ConfigError(f"data: {path} must have a column {theirs!r}, got {', '.join(header)}")
    columns: dict[str, list[str | float | int]] = {ours: [] for ours in wanted.values()}
    at = {ours: header.index(theirs) for theirs, ours in wanted.items()}
    broken = 0
    for number, line in enumerate(lines[has_header:], start=1 + has_header):
        if len(line) <= max(at.values()):
            if labelled:  # QQP's own files have a few broken lines
                broken += 1
                continue
            raise ConfigError(f"data: line {number} of {path} has {len(line)} columns, {max(at.values()) + 1} needed")
        for ours, column in at.items():
            value = line[column]
            columns[ours].append(_label(value, spec, path, number) if ours == "label" else value)
    if broken:
        logger.warning("%s: %d lines without all of their columns are left out", path, broken)
    return Dataset.from_dict(columns)


def _label(value: str, spec: GlueSpec, path: Path, number: int) -> float | int:
    try:
        if spec.is_regression:
            return float(value)
        return spec.labels.index(value) if value in spec.labels else int(value)
    except ValueError as error:
        allowed = ", ".join(spec.labels) or "a number"
        raise ConfigError(f"data: label out of range in line {number} of {path}: {value!r} is not {allowed}") from error
