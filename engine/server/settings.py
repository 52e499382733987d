"""This module holds every setting of the HTTP face with its default. It does not know what enforces them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ..errors import ConfigError, describe

__all__ = ["Limits", "ServerSettings", "is_loopback", "read_api_keys"]

_ALLOWED_KEY_CHARS = frozenset(map(chr, range(0x21, 0x7F)))


def _limit(default: Any, words: str) -> Any:
    return field(default=default, metadata={"words": words})


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one client, and all of them together, may take. Times are seconds.

    Raises:
        ConfigError: a value is not allowed.
    """

    body_bytes: int = _limit(4 << 20, "of a request; a larger one is refused before it is read (413)")
    body_parts: int = _limit(100_000, "strings (keys too), arrays and objects of a request (400)")
    header_bytes: int = _limit(16 << 10, "of a request's line and headers (431)")
    headers: int = _limit(100, "of a request (431)")
    header_s: float = _limit(10.0, "from the beginning of a request to the end of its headers (408)")
    body_s: float = _limit(30.0, "from there to the end of the body (408); and for a client to take what is written")
    connections: int = _limit(4096, "open at the same time, and at most what the system allows (503)")
    keep_alive_s: float = _limit(5.0, "an idle connection is kept")
    queue_s: float = _limit(60.0, "a request may wait for its turn (503)")
    request_s: float = _limit(600.0, "a request may take in all (504)")
    ping_s: float = _limit(15.0, "after which a stream that has nothing to say sends a comment")
    unread_events: int = _limit(256, "that a client may leave unread before it is cut off")
    queue_requests: int = _limit(1024, "sequences that may wait together (429)")
    queue_tokens: int = _limit(1 << 20, "of prompts that may wait together (429)")
    queue_text_bytes: int = _limit(8 << 20, "of bodies whose texts may wait together to become tokens (429)")
    output_tokens: int = _limit(1 << 20, "of one request: prompts times `n` times `max_tokens` (400)")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            number = not isinstance(value, bool) and isinstance(value, (int, float) if each.type == "float" else int)
            if not number or not (0 < value <= 2**48) or not math.isfinite(value):
                kind = "a number of seconds above 0" if each.type == "float" else "a positive integer"
                raise ConfigError(f"limit {each.name} is {describe(value)}; allowed: {kind}")

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> Limits:
        """Build from `--limit name=value`.

        Raises:
            ConfigError: a name is unknown, or a value is not allowed.
        """
        kinds = {each.name: each.type for each in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in texts.items():
            if name not in kinds:
                raise ConfigError(f"unknown limit {name!r}; allowed: {', '.join(kinds)}")
            try:
                values[name] = float(text) if kinds[name] == "float" else int(text)
            except ValueError:
                values[name] = text
        return cls(**values)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of all limits."""
        return tuple(each.name for each in fields(cls))


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Everything about serving that is not about the engine.

    Raises:
        ConfigError: a value is not allowed, or others than this machine could connect without a key.
    """

    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address needs an API key."""
    port: int = 8000
    """0 takes a free one."""
    served_model_names: tuple[str, ...] = ()
    """Names the model answers to, the first in its answers; none: its own."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of them opens every route; none: whoever is on this machine may use it."""
    shutdown_timeout_s: float = 30.0
    """How long running requests may go on after SIGTERM."""
    metrics_prefix: str = "octavo:"
    """Of every metric's name."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not isinstance(self.port, int) or isinstance(self.port, bool) or not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {describe(self.port)}; allowed: 0 to 65535")
        if not (0 <= self.shutdown_timeout_s <= 2**31):
            raise ConfigError(f"shutdown_timeout is {self.shutdown_timeout_s}; allowed: seconds of at least 0")
        for name in self.served_model_names:
            if not 1 <= len(name) <= 256 or not name.isprintable():
                raise ConfigError(f"served_model_name is {describe(name)}; allowed: 1 to 256 printable characters")
        if not re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)?", self.metrics_prefix):
            raise ConfigError(
                f"metrics_prefix is {describe(self.metrics_prefix)}; allowed: letters, digits, _ and :, no digit first"
            )
        for key in self.api_keys:
            if len(key) < 8 or not set(key) <= _ALLOWED_KEY_CHARS:
                raise ConfigError(
                    "an API key is not allowed; allowed: at least 8 printable ASCII characters, no spaces"
                )
        if not self.api_keys and not is_loopback(self.host):
            raise ConfigError(
                f"host is {self.host!r} and there is no API key; allowed: 127.0.0.1, or keys in --api-key-file or "
                "OCTAVO_API_KEYS"
            )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address can only be this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_keys(file: Path | None, environment: str | None) -> tuple[str, ...]:
    """Return the keys of a file, one a line, and of the variable OCTAVO_API_KEYS, separated by commas.

    Raises:
        ConfigError: the file cannot be read, or names no key.
    """
    keys = [key.strip() for key in (environment or "").split(",")]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            raise ConfigError(f"--api-key-file {file} cannot be read: {reason}") from None
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise ConfigError(f"--api-key-file {file} holds no key; allowed: one key a line")
        keys += lines
    return tuple(dict.fromkeys(key for key in keys if key))
