"""Loads the rows of a run: from the hub, a folder, files, or the embedded demo. Imports datasets, no deepspeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from progtuning_ds.config import DataConfig
from progtuning_ds.errors import ConfigError, did_you_mean

# Suffix -> builder of datasets and its options. Only an empty cell is missing: "None" and "NA" are words, too.
_CSV = {"keep_default_na": False, "na_values": [""]}
_READERS = {
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}


Reader = Callable[[Path], Dataset | None]


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of one use, and what to call them in a message, such as `split 'train' of glue`."""

    rows: Dataset
    name: str


@dataclass(frozen=True, slots=True)
class Splits:
    """The rows of a run by use."""

    train: Split
    evaluation: Split
    test: Split | None = None

    def __iter__(self) -> Iterator[Split]:
        yield from (split for split in (self.train, self.evaluation, self.test) if split is not None)


def load_splits(data: DataConfig, seed: int, read: Reader | None = None) -> Splits:
    """Load, hold out and limit the rows a run needs.

    Args:
        data: where they are.
        seed: seed of the draw where rows are held out or limited.
        read: reads files of a form of their own; None from it for a file means that it is of no such form.

    Raises:
        ConfigError: if a file, data set or split is missing, unreadable or empty.
    """
    splits = _from_files(data, data.train_file, read) if data.train_file else _from_source(data)
    if data.validation_fraction:
        parts = splits.train.rows.train_test_split(data.validation_fraction, seed=seed)
        held_out = Split(parts["test"], f"{data.validation_fraction:g} of {splits.train.name}")
        splits = Splits(Split(parts["train"], splits.train.name), held_out, splits.test)
    for split in splits:
        if len(split.rows) == 0:
            raise ConfigError(f"data: {split.name} holds no rows")
    return Splits(
        _limit(splits.train, data.max_train_samples, seed),
        _limit(splits.evaluation, data.max_eval_samples, seed),
        splits.test,
    )


def _limit(split: Split, rows: int | None, seed: int) -> Split:
    if rows is None or rows >= len(split.rows):
        return split
    return Split(split.rows.shuffle(seed=seed).select(range(rows)), split.name)


def _from_files(data: DataConfig, train_file: str, read: Reader | None) -> Splits:
    train = _read_file(train_file, "data.train_file", read)
    test = _read_file(data.test_file, "data.test_file", read) if data.test_file else None
    if data.validation_file:
        return Splits(train, _read_file(data.validation_file, "data.validation_file", read), test)
    if not data.validation_fraction:
        raise ConfigError("data: nothing to evaluate on; set data.validation_file or data.validation_fraction")
    return Splits(train, train, test)


def _read_file(name: str, field: str, read: Reader | None = None) -> Split:
    path = Path(name).expanduser()
    if path.suffix not in _READERS:
        raise ConfigError(f"{field} must be a file of type {', '.join(_READERS)}, got {name!r}")
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"{field}: no file {name!r}{did_you_mean(path.name, siblings)}")
    own = read(path) if read is not None else None
    if own is not None:
        return Split(own, name)
    builder, options = _READERS[path.suffix]
    try:
        rows = load_dataset(builder, data_files=str(path), split="train", **options)
    except (DatasetsError, ValueError) as error:
        if "corresponds to no data" in str(error):  # what datasets says of a file without rows
            raise ConfigError(f"{field}: {name!r} holds no rows") from error
        raise ConfigError(f"{field}: cannot read {name!r}: {_reason(error)}") from error
    return Split(rows, name)


def _from_source(data: DataConfig) -> Splits:
    source = data.source or "demo"
    found = _demo(data.config_name) if source == "demo" else load_named(source, data.config_name)
    train = _pick(found, data.train_split, source, "train_split")
    test = _pick(found, data.test_split, source, "test_split") if data.test_split else None
    if data.validation_fraction:
        return Splits(train, train, test)
    name = data.validation_split or next((name for name in ("validation", "test") if name in found), None)
    if name is None:
        raise ConfigError(
            f"data: {source} has nothing to evaluate on; set data.validation_split (one of {', '.join(found)}) "
            "or data.validation_fraction"
        )
    return Splits(train, _pick(found, name, source, "validation_split"), test)


def _demo(config_name: str | None) -> DatasetDict:
    # Imported here so that runs on other data need nothing of the embedded default.
    from progtuning_ds.assets import demo_dataset_files

    files = demo_dataset_files(config_name or "small")
    found = DatasetDict({part: _read_file(str(path), "data.source").rows for part, path in files.items()})
    return found.cast_column("label", ClassLabel(names=["negative", "positive"]))


def load_named(source: str, config_name: str | None) -> DatasetDict:
    """Load all splits of a hub data set or of a `save_to_disk` folder.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    try:
        if (Path(source) / "dataset_dict.json").is_file():
            return load_from_disk(source)
        return load_dataset(source, config_name)
    except IndexError as error:  # how datasets fails on a saved split without rows
        raise ConfigError(f"data.source: {source!r} has a split that holds no rows") from error
    except (DatasetsError, OSError, ValueError) as error:
        field = "data.source" if config_name is None else f"data.source {source!r}, data.config_name"
        raise ConfigError(f"{field}: cannot load {config_name or source!r}: {_reason(error)}") from error


def _pick(found: DatasetDict, split: str, source: str, field: str) -> Split:
    if split not in found:
        raise ConfigError(f"data.{field} must be one of {', '.join(found)}, got {split!r}{did_you_mean(split, found)}")
    return Split(found[split], f"split {split!r} of {source}")


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost cause: the outer ones only say that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__
