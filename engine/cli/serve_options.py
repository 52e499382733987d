"""This module holds what `octavo serve` can be told besides the engine's settings, by flags and by [server] of
octavo.toml. It does not know what is served.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, describe

if TYPE_CHECKING:
    from ..server.settings import Limits, ServerSettings

__all__ = ["ServeOptions", "chat_template", "crash_folder", "limit_lines", "server_settings"]

MAX_TEMPLATE_BYTES = 1 << 20
_KINDS: Mapping[str, tuple[str, type | tuple[type, ...]]] = {
    "host": ("a string", str),
    "port": ("an integer", int),
    "api_key_file": ("a file's path", (str, Path)),
    "served_model_name": ("a list of strings", list),
    "chat_template": ("a file's path", (str, Path)),
    "limits": ("a table", dict),
    "shutdown_timeout": ("a number of seconds", (int, float)),
    "metrics_prefix": ("a string", str),
    "crash_folder": ("a folder's path", (str, Path)),
}
"""What [server] may hold."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The flags; see `server_settings` for the checks. [server] may also hold `crash_folder`."""

    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach needs an API key."""
    port: int = 8000
    """0 takes a free one."""
    api_key_file: Path | None = None
    """Keys that clients must send, one a line; OCTAVO_API_KEYS may hold some, too."""
    served_model_name: list[str] | None = None
    """Name of the model for clients; given several times it has several, the first being the one in answers."""
    chat_template: Path | None = None
    """A Jinja file to use in place of the model's template."""
    limit: list[str] | None = None
    """NAME=X, a limit of what clients may take, such as queue_requests=64; "help" lists them."""
    shutdown_timeout: float = 30.0
    """Seconds that requests may go on after SIGTERM."""
    metrics_prefix: str = "octavo:"
    """What the names of metrics begin with; "vllm:" suits dashboards that are there."""


def server_settings(values: Mapping[str, Any]) -> ServerSettings:
    """Check what was given and build the server's settings.

    Args:
        values: fields of `ServeOptions`, and `limits`, by name; those not given are left out.

    Raises:
        ConfigError: a name is unknown or a value not allowed.
    """
    from ..server.settings import ServerSettings, read_api_keys

    for name, value in values.items():
        if name == "limit":
            continue
        if name not in _KINDS:
            raise ConfigError(f"unknown setting {name!r} in [server]; allowed: {', '.join(_KINDS)}")
        allowed, kind = _KINDS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{name} in [server] is {describe(value)}; allowed: {allowed}")
    names = values.get("served_model_name", [])
    if not all(isinstance(name, str) for name in names):
        raise ConfigError("served_model_name in [server] is not a list of strings")
    given = {name: values[name] for name in ("host", "port", "metrics_prefix") if name in values}
    if "shutdown_timeout" in values:
        given["shutdown_timeout_s"] = float(values["shutdown_timeout"])
    key_file = values.get("api_key_file")
    return ServerSettings(
        **given,
        served_model_names=tuple(names),
        api_keys=read_api_keys(None if key_file is None else Path(key_file), os.environ.get("OCTAVO_API_KEYS")),
        limits=_limits(values.get("limits", {}), values.get("limit", [])),
    )


def chat_template(values: Mapping[str, Any]) -> str | None:
    """Return the source of the template that was named, if any.

    Raises:
        ConfigError: it cannot be read.
    """
    if "chat_template" not in values:
        return None
    file = Path(values["chat_template"])
    try:
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ConfigError(f"--chat-template {file} has over {MAX_TEMPLATE_BYTES} bytes")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ConfigError(f"--chat-template {file} cannot be read: {reason}") from None


def crash_folder(values: Mapping[str, Any]) -> Path:
    """Return where a dying engine leaves its last steps, without any text: not given, the folder for temporary files.

    Raises:
        ConfigError: it is no folder.
    """
    folder = Path(values.get("crash_folder") or tempfile.gettempdir())
    if not folder.is_dir():
        raise ConfigError(f"crash_folder in [server] is {str(folder)!a}; allowed: a folder that is there")
    return folder


def limit_lines() -> list[str]:
    """Return a line about each limit: name, default, meaning."""
    from ..server.settings import Limits

    return [f"{each.name:<18}{each.default!s:<10}{each.metadata['words']}" for each in fields(Limits)]


def _limits(table: Mapping[str, Any], words: Sequence[str]) -> Limits:
    """Return the limits of a file, and over them those of NAME=X words."""
    from ..server.settings import Limits

    texts: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--limit is {describe(word)}; allowed: NAME=X; --limit help lists the names")
        texts[name] = text
    for name in table:
        if name not in Limits.names():
            raise ConfigError(f"unknown limit {name!r} in [server.limits]; allowed: {', '.join(Limits.names())}")
    given = Limits.from_texts(texts)
    return Limits(**{**table, **{name: getattr(given, name) for name in texts}})
