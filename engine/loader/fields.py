"""This module holds strict reading of a config's fields, by type and range. It does not know models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError

__all__ = ["MAX_POSITION", "Fields"]

MAX_POSITION = 1 << 24
"""Longest context in tokens; the longest published one is 10 million."""


class Fields:
    """The fields of one config file; a field that is null counts as absent.

    Args:
        values: field name to value, of any type.
        file: the file's name, for errors.
        prefix: put before a field's name in errors.

    In every method, a default of None means that the field is required.
    """

    def __init__(self, values: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self.values = values
        self.file = file
        self._prefix = prefix

    def get(self, key: str) -> Any:
        """Return a field's value as it stands, or None."""
        return self.values.get(key)

    def error(self, key: str, allowed: str) -> CheckpointError:
        """Return the error that names a field, its value (shortened) and what is allowed."""
        shown = repr(self.values.get(key)) if key in self.values else "missing"
        shown = shown if len(shown) <= 100 else shown[:100] + "…"
        return CheckpointError(self.file, f"{self._prefix}{key} is {shown}; supported: {allowed}")

    def integer(self, key: str, low: int, high: int, *, default: int | None = None) -> int:
        """Return an integer from `low` to `high`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(
        self, key: str, low: float, high: float, *, default: float | None = None, open_low: bool = False
    ) -> float:
        """Return a finite number from `low` (itself left out with `open_low`) to `high`."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not (low <= value <= high)
            or (open_low and value == low)
        ):
            raise self.error(key, f"a number {'above' if open_low else 'from'} {low:g} to {high:g}")
        number = float(value)
        assert math.isfinite(number), "a number within finite bounds is finite"
        return number

    def flag(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, allowed: Sequence[str], *, default: str) -> str:
        """Return one of `allowed`."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not str or value not in allowed:
            raise self.error(key, ", ".join(allowed))
        return value

    def nested(self, key: str) -> Fields:
        """Return the fields of an object inside this one; an absent one is empty."""
        value = self.values.get(key)
        if value is None:
            return Fields({}, self.file, f"{self._prefix}{key}.")
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return Fields(value, self.file, f"{self._prefix}{key}.")

    # The bounds below are far above any model and far below what would hurt: 1,024 layers make a mapping of 12,000
    # tensors, and the largest matrix has 2**38 elements, so that no product of sizes overflows an int64.

    def layers(self, key: str) -> int:
        """Return a number of layers."""
        return self.integer(key, 1, 1024)

    def heads(self, key: str, *, default: int | None = None) -> int:
        """Return a number of heads."""
        return self.integer(key, 1, 1024, default=default)

    def hidden_size(self, key: str) -> int:
        """Return a hidden size in elements."""
        return self.integer(key, 1, 1 << 18)

    def intermediate_size(self, key: str) -> int:
        """Return an MLP's inner size in elements."""
        return self.integer(key, 1, 1 << 20)

    def vocab_size(self, key: str) -> int:
        """Return a vocabulary's size in tokens."""
        return self.integer(key, 1, 1 << 24)

    def positions(self, key: str, *, default: int | None) -> int:
        """Return a length in tokens."""
        return self.integer(key, 1, MAX_POSITION, default=default)
