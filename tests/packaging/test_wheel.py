"""What a built wheel holds, and that it works away from the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Output of `code` in a new interpreter that finds `path` before anything installed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_wheel_has_two_import_packages_and_nothing_else_at_the_top(names):
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"progtuning_ds", "progtuning_kernels"}


def test_wheel_holds_every_module_preset_and_run_configuration_of_the_checkout(names):
    shipped = [path.relative_to(ROOT) for path in (ROOT / "progtuning_ds").rglob("*.py")]
    shipped += [path.relative_to(ROOT) for path in (ROOT / "progtuning_ds").rglob("*.yaml")]
    shipped += [path.relative_to(ROOT) for path in ROOT.glob("progtuning_ds/**/py.typed")]
    shipped += [path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")]
    shipped += [Path("progtuning_ds", path.relative_to(ROOT)) for path in (ROOT / "ds_configs").glob("*.json")]
    assert {path.as_posix() for path in shipped} <= set(names)


def test_wheel_carries_licence_and_console_script(wheel, names):
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "progtuning = progtuning_ds.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_presets_are_found_inside_an_unpacked_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from progtuning_ds.presets import *; print([str(preset_path(name)) for name in preset_names()])"
    found = [Path(path) for path in json.loads(run_python(code, tmp_path, tmp_path / "site").replace("'", '"'))]
    assert {path.parent for path in found} == {tmp_path / "site/progtuning_ds/ds_configs"}
    assert {path.name for path in found} == {path.name for path in (ROOT / "ds_configs").glob("*.json")}


def test_checkout_never_shadows_the_package_named_kernels(tmp_path):
    """The checkout leads the path, as in a script run from its root, and the other package comes last."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("OWNER = 'someone else'\n")
    code = "import kernels, progtuning_kernels; print(kernels.OWNER)"
    assert run_python(code, ROOT, ROOT, ROOT / "kernels", tmp_path) == "someone else"
