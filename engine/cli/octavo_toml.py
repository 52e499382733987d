"""This module holds the reading of octavo.toml. It does not know what the settings mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..errors import ConfigError, RequestError
from ..sampling_params import SamplingParams

__all__ = ["read_octavo_toml"]


def read_octavo_toml(file: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read settings, sampling parameters and what is for a server from a file.

    Settings stand at the top or in the table of their part (`[cache]`, `[scheduler]`, `[faults]`), sampling parameters
    under `[sampling]`, and what only `serve` uses under `[server]`.

    Returns:
        Settings by their flat names and sampling parameters, both checked, and `[server]`, not checked.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or holds something unknown or not allowed.
    """
    import tomllib

    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {file}: is not valid TOML: {error}") from None
    sampling, server = tables.pop("sampling", {}), tables.pop("server", {})
    try:
        EngineConfig.from_settings(tables)
        if not isinstance(sampling, Mapping):
            raise ConfigError("sampling is no table; write [sampling] above its parameters")
        if not isinstance(server, Mapping):
            raise ConfigError("server is no table; write [server] above its settings")
        SamplingParams.from_mapping(sampling)
    except (ConfigError, RequestError) as error:
        raise ConfigError(f"--config {file}: {error}") from None
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return flat, dict(sampling), dict(server)
