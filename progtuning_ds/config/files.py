"""Reads and writes YAML and JSON settings. No torch, no deepspeed."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from progtuning_ds.errors import ConfigError, did_you_mean

SUFFIXES = (".yaml", ".yml", ".json")
SHIPPED = Path(__file__).resolve().parent.parent / "configs"


class _Loader(yaml.SafeLoader):
    """YAML as people write settings: `1e-4` is a number, and a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML implements, reads 1e-4 as text; 1.2 and every reader of a learning rate disagree.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_value(text: str) -> Any:
    """Return the YAML value of `text`, as in `train.epochs=2`.

    Raises:
        yaml.YAMLError: if it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


def read_mapping(path: Path, field: str) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping; `field` names the setting that led to it.

    Raises:
        ConfigError: if the file is missing, is not YAML or JSON, or holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"{field}: no file {str(path)!r}{_near_file(path)}")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else parse_value(text)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{field}: cannot read {str(path)!r}: {reason}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{field}: {str(path)!r} must hold a mapping, got {type(data).__name__}")
    return data


def shipped_names() -> tuple[str, ...]:
    """Names of the run configurations that come with the package, such as `demo`."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def config_path(name: str) -> Path:
    """Resolve `--config`: a path, or the name of a shipped configuration.

    Raises:
        ConfigError: if it is neither; the message names the nearest of both.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in shipped_names():
        return SHIPPED / f"{name}.yaml"
    near = _near_file(path) if path.suffix else did_you_mean(name, shipped_names())
    raise ConfigError(f"--config must be a file or one of {', '.join(shipped_names())}, got {name!r}{near}")


def _near_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return ""
    return did_you_mean(path.name, (entry.name for entry in folder.iterdir() if entry.is_file()))
