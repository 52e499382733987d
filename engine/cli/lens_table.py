"""This module holds a lens as a table for a terminal: layers down, last positions across. It does not know tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["table_lines"]

MIN_WIDTH, MAX_WIDTH = 6, 14
"""Of a token, in columns of the terminal."""
PERCENT_WIDTH = 5


def table_lines(record: Mapping[str, Any], width: int) -> tuple[list[str], int]:
    """Return the lines and how many positions they show, the last ones, as many as fit.

    A cell holds the likeliest token and its probability in percent; `*` marks the answer where a layer says it already.
    """
    layers, positions, answers = record["layers"], record["positions"], record["answer_ids"]
    readings = record["paths"][0]["readings"]
    texts = [
        [_text(record, readings["top_ids"][row][column][0]) for column in range(len(positions))]
        for row in range(len(layers))
    ]
    head = [_text(record, record["token_ids"][position]) for position in positions]
    foot = [_text(record, token_id) for token_id in answers]
    columns = zip(head, foot, *texts, strict=True)
    widths = [min(max(MIN_WIDTH, *map(_width, column)), MAX_WIDTH) for column in columns]
    first, left = len(positions), width - len("answer")
    while first > 0 and left >= widths[first - 1] + PERCENT_WIDTH + 3:
        first -= 1
        left -= widths[first] + PERCENT_WIDTH + 3
    first = min(first, len(positions) - 1)
    shown = range(first, len(positions))

    def line(name: str, cells: list[str]) -> str:
        return f"{name:>6}" + "".join(cells).rstrip()

    def plain(values: list[str]) -> list[str]:
        return [f"  {_fitted(values[column], widths[column])}{'':{PERCENT_WIDTH + 1}}" for column in shown]

    lines = [line("reads", plain(head))]
    for row, layer in enumerate(layers):
        cells = []
        for column in shown:
            mark = "*" if readings["top_ids"][row][column][0] == answers[column] else " "
            percent = _percent(readings["top_probability"][row][column][0])
            cells.append(f" {mark}{_fitted(texts[row][column], widths[column])}{percent:>{PERCENT_WIDTH}} ")
        lines.append(line(str(layer), cells))
    return [*lines, line("answer", plain(foot))], len(shown)


def _text(record: Mapping[str, Any], token_id: int) -> str:
    return str(record["tokens"][str(token_id)])


def _percent(probability: float | None) -> str:
    return "NaN" if probability is None else f"{100 * probability:.0f}%"


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _fitted(text: str, width: int) -> str:
    """Return the text, cut or filled up to a width in columns of the terminal."""
    from rich.cells import set_cell_size

    return text + " " * (width - _width(text)) if _width(text) <= width else set_cell_size(text, width - 1) + "…"
