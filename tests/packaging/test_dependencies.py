"""What the code imports is what pyproject.toml declares, and every declared package has a tested version."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMES_WITH = {
    "pydantic_core": "pydantic",
    "numpy": "torchmetrics",
    "pyarrow": "datasets",
    "tokenizers": "transformers",
    "triton": "torch",  # in its CUDA builds, and only there do the kernels run
}


def imported(folder: str) -> set[str]:
    """Top-level names of the third-party modules that the Python files of a folder import, lazily or not."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"progtuning_ds", "progtuning_kernels", "tests"}


def declared(*extras: str) -> set[str]:
    """Normalised names of the packages required without an extra, or by one of `extras`."""
    names = set()
    for requirement in importlib.metadata.requires("progtuning-ds"):
        name = re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")
        extra = re.search(r"extra == '(\w+)'", requirement)
        if extra is None or extra.group(1) in extras:
            names.add(name)
    return names


@pytest.mark.parametrize(
    ("folder", "extras"), [("progtuning_ds", ()), ("kernels", ()), ("launch", ()), ("tests", ("test",))]
)
def test_every_imported_package_is_declared(folder, extras):
    owners = importlib.metadata.packages_distributions()
    packages = {owners[COMES_WITH.get(name, name)][0].lower().replace("_", "-") for name in imported(folder)}
    assert packages <= declared(*extras)


def test_every_declared_package_has_a_tested_version():
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert declared("test", "dev") - {"progtuning-ds"} <= pins
