"""Names and places of the DeepSpeed presets in `ds_configs/`. Stdlib only: no torch, no deepspeed."""

from pathlib import Path

from progtuning_ds.errors import ConfigError, did_you_mean


def _preset_dir() -> Path:
    """Folder of the presets: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "ds_configs"
    return shipped if shipped.is_dir() else package.parent / "ds_configs"


def preset_names() -> tuple[str, ...]:
    """Names that `preset_path` accepts, sorted."""
    return tuple(sorted(path.stem for path in _preset_dir().glob("*.json")))


def preset_path(name: str) -> Path:
    """Path of the DeepSpeed JSON called `name`, such as `"zero2"`.

    Raises:
        ConfigError: if there is no such preset; the message names the nearest one.
    """
    names = preset_names()
    if name not in names:
        raise ConfigError(
            f"DeepSpeed preset must be one of {', '.join(names)}, got {name!r}{did_you_mean(name, names)}"
        )
    return _preset_dir() / f"{name}.json"
