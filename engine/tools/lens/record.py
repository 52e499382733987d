"""This module holds a lens as plain values, for JSON and the page. It does not know how either looks."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from ...text import Tokenizer
from .look import Lens
from .readings import Readings

__all__ = ["lens_record", "token_label"]

_MARKS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})


def lens_record(lens: Lens) -> dict[str, Any]:
    """Return everything but the hidden states themselves.

    Arrays are [layers][positions], of `readings` by the names of `Readings`; what is not finite is None. `tokens` has
    the label of every token id that occurs.
    """
    engine, first = lens.llm.engine, lens.first_position
    ids = {*lens.token_ids, *lens.answer_ids.tolist()}
    ids |= {token_id for path in lens.paths for token_id in np.unique(path.readings.top_ids).tolist()}
    num_positions = len(lens.answer_ids)
    return {
        "model": engine.config.model,
        "dtype": engine.resolved.dtype,
        "device": engine.resolved.device,
        "num_layers": engine.model_config.num_layers,
        "token_ids": lens.token_ids,
        "num_prompt_tokens": lens.num_prompt_tokens,
        "finish_reason": None if lens.output.finish_reason is None else lens.output.finish_reason.value,
        "error": lens.output.error,
        "positions": list(range(first, first + num_positions)),
        "layers": list(lens.layers),
        "answer_ids": lens.answer_ids.tolist(),
        "settled": [layer if layer >= 0 else None for layer in lens.settled.tolist()],
        "paths": [{"backend": path.backend, "readings": _plain(path.readings)} for path in lens.paths],
        "differences": None if lens.differences is None else _listed(lens.differences),
        "why_alone": lens.why_alone or None,
        "tokens": {str(token_id): token_label(engine.tokenizer, token_id) for token_id in sorted(ids)},
    }


def token_label(tokenizer: Tokenizer | None, token_id: int) -> str:
    """Return what a token stands for, on one line: spaces and line ends visible, bytes that are no text as \\xNN."""
    if tokenizer is None or token_id >= tokenizer.vocab_size:
        return f"#{token_id}"
    piece = tokenizer.pieces(skip_special_tokens=False)[token_id]
    if isinstance(piece, int):
        piece = bytes((piece,))
    text = piece.decode(errors="backslashreplace") if isinstance(piece, bytes) else piece or ""
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text.translate(_MARKS))
    return shown or f"#{token_id}"


def _plain(readings: Readings) -> dict[str, Any]:
    return {each.name: _listed(getattr(readings, each.name)) for each in fields(Readings)}


def _listed(values: np.ndarray[Any, Any]) -> Any:
    """Return nested lists; of floats six digits."""
    if values.dtype.kind == "i":
        return values.tolist()
    if values.ndim > 1:
        return [_listed(row) for row in values]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]
