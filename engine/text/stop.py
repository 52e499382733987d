"""This module holds the search for stop strings in streamed text. It does not know tokens.

The stop that is complete first wins, and among those complete at the same character the longest: that is the earliest
moment at which generation can end, and it does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["StopMatcher", "StopResult"]


class StopResult(NamedTuple):
    """What one piece of text led to.

    `text` can be shown now. `hit` is the stop string that ended the text in this piece, or None; the caller that feeds
    one token at a time thereby knows which token completed it.
    """

    text: str
    hit: str | None


class StopMatcher:
    """Finds the first stop string in text that comes in pieces, and holds back what may be the start of one.

    An Aho-Corasick automaton (https://doi.org/10.1145/360825.360855): its depth is the length of the longest end of the
    text that begins a stop, which is exactly what has to be held back. Linear in the text, whatever the stops.

    Args:
        stops: non-empty strings; none is allowed.
        include_stop: end the text after the stop string and not before it.
    """

    __slots__ = ("_children", "_depth", "_fail", "_first_chars", "_held", "_hit", "_include", "_longest", "_node")

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        assert all(stops), "a stop string is empty"
        self._include = include_stop
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._fail = [0]
        self._longest: list[str | None] = [None]
        """Per node: the longest stop that ends there."""
        self._node = 0
        self._held = ""
        self._hit: str | None = None
        for stop in stops:
            self._insert(stop)
        self._link()
        self._first_chars = frozenset(self._children[0])

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._children[node].get(char)
            if child is None:
                child = self._children[node][char] = len(self._children)
                self._children.append({})
                self._depth.append(self._depth[node] + 1)
                self._fail.append(0)
                self._longest.append(None)
            node = child
        self._longest[node] = stop

    def _link(self) -> None:
        queue = deque(self._children[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._children[node].items():
                self._fail[child] = self._step(self._fail[node], char)
                queue.append(child)
            self._longest[node] = self._longest[node] or self._longest[self._fail[node]]

    def _step(self, node: int, char: str) -> int:
        while node and char not in self._children[node]:
            node = self._fail[node]
        return self._children[node].get(char, 0)

    def passes(self, text: str) -> bool:
        """Whether the next piece is text that no stop claims, all of it; then it need not be appended."""
        return not self._node and self._first_chars.isdisjoint(text)

    def append(self, text: str, *, may_end: bool = True) -> StopResult:
        """Take the next piece of text; nothing may follow a hit.

        Args:
            text: the piece.
            may_end: whether a stop that is complete in this piece ends the text.
        """
        assert self._hit is None, "text was appended after a stop string was found"
        if self.passes(text):
            return StopResult(text, None)
        node, held = self._node, self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            node = self._step(node, char)
            hit = self._longest[node]
            if hit is not None and may_end:
                self._hit, self._held = hit, ""
                return StopResult(held[: end if self._include else end - len(hit)], hit)
        self._node = node
        cut = len(held) - self._depth[node]
        self._held = held[cut:]
        return StopResult(held[:cut], None)

    def finish(self) -> str:
        """Return the text held back, which no stop string can claim any more."""
        held, self._held, self._node = self._held, "", 0
        return held
