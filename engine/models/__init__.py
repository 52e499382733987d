"""This package holds the decoder that every supported family is a configuration of. It does not know file formats."""

from __future__ import annotations

from .decoder import Decoder

__all__ = ["Decoder"]
