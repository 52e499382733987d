"""This module holds the prompts the benchmarks run: real English of chosen lengths. It does not know any engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Protocol

__all__ = ["Encoder", "prompts"]

_OPENINGS = (
    "Explain in plain words what this says: ",
    "Summarise the following for a colleague: ",
    "Translate this passage into everyday English: ",
    "What does the next paragraph allow me to do? ",
    "List the obligations in this text: ",
    "Rewrite this so that a child could follow it: ",
    "Which words here matter most, and why? ",
    "Continue this text in the same style: ",
)


class Encoder(Protocol):
    """Anything that turns text into token ids."""

    def encode(self, text: str) -> list[int]: ...


def prompts(
    encoder: Encoder,
    num_prompts: int,
    min_tokens: int = 32,
    max_tokens: int = 256,
    spread: Literal["log", "even"] = "log",
) -> list[list[int]]:
    """Return prompts as token ids, short and long ones mixed.

    Lengths are spread evenly between the two, or evenly on a logarithmic scale: most short, few long, as prompts are.

    The text is this repository's LICENSE, each prompt from another place in it and with a task in front, so that no two
    share a prefix of a block.
    """
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    words = re.sub(r"\s+", " ", text).split(" ")
    made = []
    for i in range(num_prompts):
        # A stride coprime to the count visits every length once, neither ascending nor descending.
        place = i * 13 % num_prompts
        part = place / max(1, num_prompts - 1)
        if spread == "log":
            length = round(min_tokens * (max_tokens / min_tokens) ** part)
        else:
            length = round(min_tokens + (max_tokens - min_tokens) * part)
        start = i * 37 % max(1, len(words) - 2 * max_tokens)
        passage = f"({i + 1}) {_OPENINGS[i % len(_OPENINGS)]}" + " ".join(words[start : start + 2 * max_tokens])
        made.append(encoder.encode(passage)[:length])
    return made
