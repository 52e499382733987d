"""This module holds the parts of a page that are text: notes, facts, tables, bars. It does not know the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from .numbers import number

__all__ = [
    "SORTABLE",
    "Cell",
    "Html",
    "Value",
    "bars",
    "details",
    "facts",
    "legend",
    "note",
    "strip",
    "table",
    "tag",
    "text_lines",
    "to_html",
]

NUM_COLOURS = 8
"""Classes c0 to c7 of the style sheet."""
SORTABLE = " data-sortable"
"""An attribute of the tables that the page's script looks for."""
CARD_COLUMNS = 5
"""Tables with more columns become a card for each row on a phone."""


class Html(str):
    """Markup, which goes into a page as it is."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table that is more than its value."""

    value: Value
    kind: Literal["", "bad", "good", "soft"] = ""
    small: str = ""
    """A second line."""
    share: float | None = None
    """Part of a whole, 0 to 1, drawn as a bar."""
    sort: float | str | None = None
    """What to sort by; None: the value."""


Value = str | int | float | bool | None


def tag(name: str, text: Value | Html, kind: str = "") -> Html:
    """Return a text in a tag, escaped."""
    return Html(f"<{name}{f' class={kind!r}' if kind else ''}>{to_html(text)}</{name}>")


def to_html(value: Value) -> Html:
    """Return a value as it is shown."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("")
    if isinstance(value, bool):
        return Html("yes" if value else "no")
    return Html(escape(value if isinstance(value, str) else number(value)))


def note(text: str) -> Html:
    """Return a paragraph."""
    return tag("p", text)


def facts(values: Mapping[str, Value]) -> Html:
    """Return names with their values."""
    rows = "".join(f"<div>{tag('dt', name)}{tag('dd', value)}</div>" for name, value in values.items())
    return Html(f"<dl>{rows}</dl>")


def details(summary: str, *parts: str) -> Html:
    """Return parts that are folded away until asked for."""
    body = "".join(part if isinstance(part, Html) else note(part) for part in parts)
    return Html(f"<details>{tag('summary', summary)}{body}</details>")


def legend(names: Sequence[str]) -> Html:
    """Return which colour is what, in the order of the colours."""
    if not names:
        return Html("")
    keys = "".join(f'<span><i class="c{i % NUM_COLOURS}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return Html(f'<div class="legend">{keys}</div>')


def table(columns: Sequence[str], rows: Sequence[Sequence[Value | Cell]], *, sortable: bool = False) -> Html:
    """Return a table; columns of numbers stand right.

    Args:
        columns: their names.
        rows: a value, or more of it, for each column.
        sortable: a click on a name sorts.
    """
    cells = [[each if isinstance(each, Cell) else Cell(each) for each in row] for row in rows]
    assert all(len(row) == len(columns) for row in cells), "a cell for each column"
    right = [_is_right([row[i] for row in cells]) for i in range(len(columns))]
    kinds = f'class="{"cards" if len(columns) > CARD_COLUMNS else ""}"{SORTABLE if sortable else ""}'
    names = [f"<button>{escape(name)}</button>" if sortable else escape(name) for name in columns]
    head = "".join(
        f'<th scope="col"{" class=n" if is_right else ""}>{name}</th>'
        for name, is_right in zip(names, right, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(_cell(*each) for each in zip(row, columns, right, strict=True))}</tr>" for row in cells
    )
    return Html(f'<div class="scroll"><table {kinds}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def text_lines(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Return a table for a terminal: the first column stands left, second lines of the others behind their values."""
    texts = [list(columns)]
    texts += [[str(row[0].value), *(f"{each.value or ''} {each.small:>6}".strip() for each in row[1:])] for row in rows]
    widths = [max(len(line[i]) for line in texts) for i in range(len(columns))]
    put = [str.ljust] + [str.rjust] * (len(columns) - 1)
    return ["  ".join(put[i](text, widths[i]) for i, text in enumerate(line)).rstrip() for line in texts]


def _is_right(column: Sequence[Cell]) -> bool:
    """Return whether a column is one of numbers, without bars."""
    kinds = {type(_key(cell)) for cell in column if _key(cell) is not None}
    return bool(kinds) and kinds <= {int, float} and all(cell.share is None for cell in column)


def _key(cell: Cell) -> Value:
    return cell.value if cell.sort is None else cell.sort


def _cell(cell: Cell, column: str, is_right: bool) -> str:
    kind = " ".join(filter(None, (cell.kind, "n" if is_right else "")))
    key = _key(cell)
    text = to_html(cell.value) + (tag("small", cell.small) if cell.small else "")
    if cell.share is not None:
        text += f'<b class="share"><i style="width:{100 * min(max(cell.share, 0.0), 1.0):.1f}%"></i></b>'
    sort = "" if key is None else f' data-key="{escape(str(key))}"'
    return f'<td class="{kind}" data-name="{escape(column)}"{sort}>{text}</td>'


def bars(
    rows: Mapping[str, float | Sequence[float]],
    *,
    parts: Sequence[str] = (),
    show: Callable[[float], str] = number,
    longest: float | None = None,
    fill: bool = False,
) -> Html:
    """Return a bar for each row, all on one scale from zero.

    Args:
        rows: name -> its value, or one for each of `parts`, which are put end to end.
        parts: names of those.
        show: writes a value.
        longest: what fills the width; None: the largest row.
        fill: every row fills it, to compare what rows are made of.
    """
    stacks = {name: [value] if isinstance(value, int | float) else list(value) for name, value in rows.items()}
    whole = max([sum(stack) for stack in stacks.values()], default=0.0) if longest is None else longest
    lines = []
    for name, stack in stacks.items():
        lines += [tag("span", name), tag("span", show(sum(stack)), "n")]
        lines.append(strip(stack, parts, show=show, whole=None if fill else whole))
    return Html(f'<div class="bars">{"".join(lines)}</div>{legend(parts)}')


def strip(
    stack: Sequence[float],
    parts: Sequence[str] = (),
    *,
    show: Callable[[float], str] = number,
    whole: float | None = None,
) -> Html:
    """Return values as one bar, end to end in `legend`'s colours; `whole` fills the width, by default their sum."""
    scale = 100 / ((sum(stack) if whole is None else whole) or 1)
    pieces = "".join(
        f'<i class="c{i % NUM_COLOURS}" style="width:{scale * value:.2f}%"'
        f' title="{escape(f"{parts[i]}: {show(value)}" if parts else show(value))}"></i>'
        for i, value in enumerate(stack)
        if value
    )
    return Html(f'<b class="bar">{pieces}</b>')
