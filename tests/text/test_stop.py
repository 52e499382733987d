"""Stop strings against the definition on the whole text."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.text import StopMatcher


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None, int]:
    """The shown text, the stop and where it is complete: the first end, and of the stops that end there the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop, end
    return text, None, len(text)


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None, int]:
    matcher = StopMatcher(stops, include)
    shown, seen = "", 0
    for piece in pieces:
        seen += 1
        text, hit = matcher.append(piece)
        shown += text
        if hit is not None:
            return shown + matcher.finish(), hit, seen
    return shown + matcher.finish(), None, seen


def test_equals_the_definition(examples: Any) -> None:
    # Two letters, so that stops overlap themselves, each other and the text; a third one to break them apart.
    words = st.text("ab", min_size=1, max_size=5)

    @examples(300, 5000)
    @given(st.text("aaabb\0", max_size=40), st.lists(words, max_size=3), st.booleans(), st.data())
    def check(text: str, stops: list[str], include: bool, data: st.DataObject) -> None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        bounds = [0, *cuts, len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
        shown, hit, seen = run(pieces, stops, include)
        expected, expected_hit, end = naive(text, stops, include)
        assert (shown, hit) == (expected, expected_hit)
        if hit is not None:
            before = sum(map(len, pieces[: seen - 1]))
            assert before < end <= before + len(pieces[seen - 1])

    check()


def test_equals_the_definition_for_all_short_texts() -> None:
    words = ["".join(letters) for size in (2, 3, 4) for letters in itertools.product("ab", repeat=size)]
    texts = ["".join(letters) for letters in itertools.product("ab", repeat=7)]
    for stops in [[word] for word in words] + [list(pair) for pair in itertools.pairwise(words)]:
        for text in texts:
            assert run(list(text), stops, False)[:2] == naive(text, stops, False)[:2], (stops, text)


def test_holds_back_only_what_may_begin_a_stop() -> None:
    matcher = StopMatcher(["</end>", "\n\n"])
    assert matcher.append("a < b </en") == ("a < b ", None)
    assert matcher.append("x") == ("</enx", None)
    assert matcher.append("\n") == ("", None)
    assert matcher.append("y") == ("\ny", None)
    assert matcher.append("z\n") == ("z", None)
    assert matcher.append("\nw") == ("", "\n\n")


@pytest.mark.parametrize(("include", "shown"), [(False, "x"), (True, "xbc")])
def test_the_stop_complete_first_wins_over_the_one_begun_first(include: bool, shown: str) -> None:
    assert run(list("xbcde"), ["bcde", "bc"], include)[:2] == (shown, "bc")


def test_the_longest_wins_among_those_complete_together() -> None:
    assert run(["xabcd"], ["cd", "abcd"], False)[:2] == ("x", "abcd")


def test_text_held_back_is_released_at_the_end() -> None:
    matcher = StopMatcher(["abc"])
    assert matcher.append("xab") == ("x", None)
    assert matcher.finish() == "ab"
    assert matcher.finish() == ""


def test_cost_is_linear_in_hostile_text(count: Callable[[int, int], int]) -> None:
    """Counted in automaton steps, not in seconds: two per character is the automaton's own bound."""
    steps = 0

    class Counting(StopMatcher):
        def _step(self, node: int, char: str) -> int:
            nonlocal steps
            while node and char not in self._children[node]:
                node = self._fail[node]
                steps += 1
            steps += 1
            return self._children[node].get(char, 0)

    matcher = Counting(["a" * 255 + "b", "a" * 200 + "c"])
    steps, length = 0, count(2_000, 20_000)
    for _ in range(length):
        matcher.append("a")
    assert length <= steps <= 2 * length + 2


def test_a_stop_that_may_not_end_the_text_is_text() -> None:
    matcher = StopMatcher(["ab", "abc"])
    assert matcher.append("xab", may_end=False) == ("x", None)
    assert matcher.append("ab", may_end=False) == ("ab", None)
    assert matcher.append("c") == ("", "abc")
    matcher = StopMatcher(["ab"])
    assert matcher.append("a", may_end=False) == ("", None)
    assert matcher.append("b") == ("", "ab")
