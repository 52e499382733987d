"""This module holds the texts that are verified where nobody names others. It does not know what is done with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...errors import ConfigError

__all__ = ["BUILT_IN", "Text", "built_in_texts", "make_texts"]

RANDOM_LENGTHS = (1, 2, 17, 33, 48, 64, 90)
"""Of the texts for a model that has no tokenizer, in tokens."""
_OPENING = (
    "You are the keeper of a lighthouse on a small island. Ships pass every night, and once a week a boat brings "
    "bread, oil and letters. You answer the questions of visitors in plain words and never in more than two "
    "sentences.\n\n"
)

BUILT_IN: dict[str, str] = {
    "fact": "The capital of France is Paris, which lies on the river Seine.",
    "opening, first question": _OPENING + "Visitor: How many steps are there to the lamp?\nKeeper: There are 186.",
    "opening, second question": _OPENING
    + "Visitor: Have you ever seen a whale?\nKeeper: Every spring, from the gallery.",
    "python": (
        "def merge(left, right):\n"
        '    """Return the items of two sorted lists in one sorted list."""\n'
        "    merged = []\n"
        "    while left and right:\n"
        "        source = left if left[0] <= right[0] else right\n"
        "        merged.append(source.pop(0))\n"
        "    return merged + left + right\n"
    ),
    "json": '{"id": 4711, "tags": ["salt", "oak"], "price": 12.50, "stock": null, "sold": false}',
    "arithmetic": "17 + 25 = 42\n42 * 3 = 126\n126 - 100 = 26\n26 / 2 = 13\n",
    "german": "Übermäßig große Möbel passen selten durch die schmale Tür eines alten Bauernhauses.",
    "french": "L'été dernier, nous avons loué une maison où l'on entendait la mer dès le réveil.",
    "russian": "Зимой дни короткие, а ночи долгие и тихие.",
    "chinese": "山上的雪到了春天才会融化。",
    "arabic": "الماء سر الحياة على الأرض.",
    "emoji": "Ready? 🚀🚀 3… 2… 1… 🎉",
    "repetition": "tick tock " * 24,
    "long": (
        "A tide is the slow rise and fall of the sea. It is raised by the pull of the moon and, to a lesser degree, of "
        "the sun. The moon pulls more strongly on the side of the earth that faces it than on the centre, and more "
        "strongly on the centre than on the far side, so the water bulges in two places at once. As the earth turns "
        "beneath the two bulges, most coasts see two high waters and two low waters in a little less than twenty-five "
        "hours. When sun and moon pull in one line, at new and at full moon, the range is greatest; these are spring "
        "tides. When they pull at a right angle, at half moon, it is least; these are neap tides. The shape of the "
        "coast matters as much as the sky. In a wide ocean the difference may be half a metre, while in a narrow bay "
        "that happens to swing in time with the pull it can exceed fifteen. Sailors therefore never trusted a general "
        "rule. They kept tables for every harbour, wrote down what they saw, and corrected the tables year after year, "
        "long before anybody could say why the numbers were as they were."
    ),
}
"""Name -> text: languages, code, numbers, two that begin alike, and one long enough for several chunks."""


class Text(NamedTuple):
    """Token ids to feed one by one, whatever the model would say."""

    name: str
    token_ids: list[int]


def built_in_texts(encode: Callable[[str], list[int]] | None, vocab_size: int) -> list[Text]:
    """Return the built-in texts, or random token ids where there is no tokenizer."""
    if encode is not None:
        return [Text(name, encode(text)) for name, text in BUILT_IN.items()]
    rng = random.Random(0)
    drawn = [[rng.randrange(vocab_size) for _ in range(length)] for length in RANDOM_LENGTHS]
    drawn.append(drawn[-1][:64] + drawn[2])
    return [Text(f"random, {len(ids)} tokens", ids) for ids in drawn]


def make_texts(named: Sequence[Text], max_tokens: int, *, cut: bool) -> list[Text]:
    """Return the texts that can be run.

    Args:
        named: with at least one token each.
        max_tokens: the longest that the engine takes; it must sample one token more.
        cut: shorten what is too long, instead of refusing it.

    Raises:
        ConfigError: a text is too long or empty, or two have one name.
    """
    texts: dict[str, Text] = {}
    for name, token_ids in named:
        if name in texts:
            raise ConfigError(f"two texts are named {name!a}; a divergence would not say which")
        if not token_ids:
            raise ConfigError(f"text {name!a} has no token")
        if len(token_ids) >= max_tokens and not cut:
            raise ConfigError(
                f"text {name!a} has {len(token_ids):,} tokens; allowed: below {max_tokens:,}, the longest sequence; "
                "--kv-cache-tokens makes room for more where the model allows it"
            )
        texts[name] = Text(name, token_ids[: max_tokens - 1])
    return list(texts.values())
