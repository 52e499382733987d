"""This module holds which features there are beside each other, the fewest runs in which every two meet, and the table
of how every two get on. It does not know what the right answers are.

A way is a feature of how an engine runs; a wish is one of what a request asks for. All requests run together in every
way, so that every two ways meet every two wishes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from octavo.engine.errors import RequestError
from octavo.engine.sampling_params import SamplingParams

WAYS: dict[str, dict[str, Any]] = {
    "overlap": {"overlap": True},
    "graphs": {"graphs": True},
    "chunks": {"max_num_batched_tokens": 16},
    "prefix hits": {"prefix_caching": True},
    "preemption": {"preempt_every": 3},
    "aborts": {},
    "invariant": {"invariant": True},
}
"""Feature -> settings; a run with aborts has others' requests come and go beside it."""
PLAIN: dict[str, Any] = {"overlap": False, "graphs": False, "prefix_caching": False}
"""The synchronous eager engine, which says what is right."""

LISTED = [token for token in range(256) if token % 5]
WISHES: dict[str, dict[str, Any]] = {
    "seed": {"temperature": 1.0, "seed": 77, "top_k": 60, "top_p": 0.95, "min_p": 0.001},
    "n": {"n": 2},
    "stop strings": {"stop": ["e", "t", "a", "o", "i", "n", "3", "7", "\n", "%", "th"]},
    "structured output": {"structured_outputs": {"regex": "([a-z][0-9])+"}},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": [70, 80, *range(100, 256)]},
    "logprobs": {"logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "bad words": {"bad_words_token_ids": [[3], *([token, token + 1] for token in range(40, 90))]},
    "logit_bias": {"logit_bias": {70: 3.0, 80: 3.0, 200: -100.0}},
    "allowed ids": {"allowed_token_ids": LISTED},
    "hidden states": {"return_hidden_states": [0, 1]},
    "no text": {"detokenize": False},
}
"""Feature -> parameters."""


def params(wishes: Sequence[str]) -> SamplingParams:
    """Return the parameters of a request that wishes for all of these."""
    # What takes whole steps out of graphs ends before the others.
    merged = {"temperature": 0, "max_tokens": 8 if "hidden states" in wishes else 20}
    for wish in wishes:
        merged |= WISHES[wish]
    return SamplingParams(**merged)  # type: ignore[arg-type]


def refused_wishes() -> dict[frozenset[str], str]:
    """Return which two wishes no request may have, and the name under which that is refused."""
    found = {}
    for pair in itertools.combinations(WISHES, 2):
        try:
            params(pair)
        except RequestError as error:
            found[frozenset(pair)] = str(error.param)
    return found


def covering(features: Sequence[str], allowed: Callable[[frozenset[str]], bool]) -> list[frozenset[str]]:
    """Return few sets of features, so that of every two there is a set with both, with either one, and with neither.

    Args:
        features: in the order that decides between equals.
        allowed: whether a set may be; one without an allowed set of both is left uncovered.
    """
    pairs = list(itertools.combinations(features, 2))
    missing = {
        (a, b, has_a, has_b)
        for a, b in pairs
        for has_a, has_b in itertools.product((True, False), repeat=2)
        if not (has_a and has_b) or allowed(frozenset((a, b)))
    }
    sets = []
    while missing:
        # What has been missing for long is met first; the rest is chosen one by one, for what it adds.
        a, b, has_a, has_b = min(missing, key=lambda one: (features.index(one[0]), features.index(one[1]), one[2:]))
        chosen = {a: has_a, b: has_b}
        for feature in features:
            if feature not in chosen:
                gains = {}
                for value in (True, False):
                    tried = chosen | {feature: value}
                    on = frozenset(name for name, is_on in tried.items() if is_on)
                    gains[value] = len(missing & _met(tried)) if allowed(on) else -1
                chosen[feature] = gains[True] > gains[False]
        sets.append(frozenset(name for name, is_on in chosen.items() if is_on))
        missing -= _met({feature: feature in sets[-1] for feature in features})
    return sets


def _met(chosen: Mapping[str, bool]) -> set[tuple[str, str, bool, bool]]:
    names = [*WAYS, *WISHES]
    ordered = sorted(chosen, key=names.index)
    return {(a, b, chosen[a], chosen[b]) for a, b in itertools.combinations(ordered, 2)}


def wish_sets() -> list[list[str]]:
    """Return the wishes of requests in which every two that may meet do."""
    refused = refused_wishes()
    sets = covering(list(WISHES), lambda wishes: not any(pair <= wishes for pair in refused))
    return [[wish for wish in WISHES if wish in wishes] for wishes in sets]


def make_table(
    cells: Mapping[frozenset[str], str], refused: Mapping[frozenset[str], str], num_equal_wishes: int
) -> str:
    """Return the README's part.

    Args:
        cells: how a way gets on with another feature: "equal", or why steps fall back.
        refused: two wishes -> the name under which they are refused together.
        num_equal_wishes: how many of the other pairs of wishes were compared.
    """
    reasons = sorted({cell for cell in cells.values() if cell != "equal"})
    marks = {"equal": "="} | {reason: f"= ({number})" for number, reason in enumerate(reasons, start=1)}
    lines = ["| | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for feature in (*WAYS, *WISHES):
        row = ["" if feature == way else marks[cells[frozenset((feature, way))]] for way in WAYS]
        lines.append(f"| {feature} | " + " | ".join(row) + " |")
    lines += ["", "`=`: the tokens, and with `invariant` the bits, of the synchronous engine without graphs."]
    lines += [
        f"({number}) some steps fall back from graph to op by op: {reason}." for number, reason in enumerate(reasons, 1)
    ]
    named = "; ".join(f"{' with '.join(sorted(pair))} (refused as `{name}`)" for pair, name in refused.items())
    lines.append(f"Of what requests ask for, {num_equal_wishes} pairs are equal in all ways; refused: {named}.")
    return "\n".join(lines) + "\n"
