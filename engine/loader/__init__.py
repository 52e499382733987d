"""This package turns a model's name into checked configs and weights. It does not know the modules that use them."""

from __future__ import annotations

from .checkpoint import Checkpoint, resolve_model

__all__ = ["Checkpoint", "resolve_model"]
