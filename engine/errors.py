"""This module holds every exception the engine raises on purpose, and how they show a value. It does not know who
catches them.

A `RequestError` ends one request and touches no other; a `ConfigError`, `CheckpointError` or `CapacityError` stops a
start-up; an `EngineDeadError` means that no request can be served any more.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BusyError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "EngineDeadError",
    "OctavoError",
    "RequestError",
    "describe",
]


class OctavoError(Exception):
    """Base of every error that octavo raises on purpose."""


class ConfigError(OctavoError):
    """A setting of the engine is wrong: names the setting, its value and what is allowed."""


class CheckpointError(OctavoError):
    """A file of a checkpoint is damaged, hostile or not supported.

    Args:
        file: the file's name (not its full path), or the checkpoint's folder name.
        reason: what is wrong, with the number that shows it.
        tensor: the tensor concerned, where there is one.
    """

    def __init__(self, file: str, reason: str, tensor: str | None = None) -> None:
        self.file = file
        self.reason = reason
        self.tensor = tensor
        super().__init__(f"{file}: tensor {tensor!r}: {reason}" if tensor is not None else f"{file}: {reason}")


class CapacityError(OctavoError):
    """The machine has too little memory for what was asked: names the bytes needed, the bytes there and a way out."""


class RequestError(OctavoError):
    """One request is refused or has failed; every other request goes on.

    Args:
        message: the field's value and what is allowed.
        param: the field at fault, by its public name, where there is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class BusyError(RequestError):
    """One request is refused for now, as too much waits already; the same may be taken later."""


class EngineDeadError(OctavoError):
    """The engine has met a fault it cannot recover from; requests in flight are lost."""


def describe(value: Any) -> str:
    """Return a short, escaped form of any value: repr() of a 5,000-digit integer raises, of a prompt is too long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return ascii(value) if len(value) <= 40 else f"a string of {len(value)} characters"
    if isinstance(value, (list, tuple, dict, set, frozenset, bytes, bytearray)):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"
