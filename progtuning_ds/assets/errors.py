"""The one error of the embedded assets. Imports nothing heavier than the package's own errors."""

from progtuning_ds.errors import ConfigError


class AssetError(ConfigError):
    """An embedded asset could not be fetched, checked or stored; one line says which, why and what to do."""
