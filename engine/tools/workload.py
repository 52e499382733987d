"""This module holds the requests that a server is loaded with: drawn at random or read from files. It does not know how
they are sent.

Random prompts are words that nearly every tokenizer has as one token with the space before, so that no tokenizer is
needed and any endpoint can be asked; how many tokens there were is the server's to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, describe
from ..strict_json import parse_json

__all__ = ["LoadRequest", "gamma_arrivals", "random_requests", "read_jsonl", "sharegpt_pairs", "sharegpt_requests"]

_WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea kid body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
force education foot boy age policy process music market sense nation plan college interest death experience effect use
class control care field development role effort rate heart drug show leader light voice wife police mind price report
decision son view relationship town road arm difference value building action season society tax director position
player record paper space ground form event official matter center couple site project activity star table need court
oil situation cost industry figure street image phone data picture practice piece land product doctor wall patient
worker news test movie north love support technology step baby computer type attention film tree source organization
hair look window culture chance brother energy period course summer plant opportunity term letter condition choice
"""
WORDS = tuple(dict.fromkeys(_WORDS.split()))
"""Common English nouns."""
MIN_TOKENS, MAX_PROMPT_TOKENS, MAX_TOTAL_TOKENS = 4, 1024, 2048
"""What is taken of ShareGPT, as in others' benchmarks: prompts and answers neither trivial nor very long."""
OUTPUT_KEYS = ("max_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request of a load."""

    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]
    """A text, token ids, or the messages of a conversation."""
    max_tokens: int


def random_requests(
    num: int,
    *,
    seed: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    vocab_size: int | None = None,
) -> list[LoadRequest]:
    """Draw prompts of random words, or of random token ids.

    Args:
        num: requests.
        seed: same seed, same requests.
        input_len, output_len: words of a prompt and tokens of an answer.
        range_ratio: lengths are even in [(1 - ratio) length, (1 + ratio) length].
        prefix_len: words in front of that, the same for all.
        vocab_size: draw ids below it instead of words.
    """
    rng = np.random.default_rng(seed)
    words = np.array(WORDS) if vocab_size is None else np.arange(vocab_size)
    prefix = rng.choice(words, prefix_len).tolist()

    def lengths(middle: int) -> list[int]:
        low, high = int(middle * (1 - range_ratio)), int(middle * (1 + range_ratio))
        return [int(each) for each in rng.integers(max(low, 1), max(high, 1), num, endpoint=True)]

    sizes = list(zip(lengths(input_len), lengths(output_len), strict=True))
    drawn = [(prefix + rng.choice(words, num_words).tolist(), num_tokens) for num_words, num_tokens in sizes]
    return [LoadRequest(" ".join(each) if vocab_size is None else each, num_tokens) for each, num_tokens in drawn]


def gamma_arrivals(num: int, rate: float, burstiness: float, seed: int) -> npt.NDArray[np.float64]:
    """Return when each of `num` requests arrives, in seconds from the start; their mean rate is exactly the one asked
    for.

    Args:
        num: requests.
        rate: requests per second; inf: all at once.
        burstiness: shape of the gamma distribution of the times between arrivals: 1 is a Poisson process, less comes in
            bursts, more is more even, inf is a metronome.
        seed: same seed, same times.

    Raises:
        ConfigError: times so long, or gaps so uneven, that no numbers hold them.
    """
    if math.isinf(rate):
        return np.zeros(num)
    gaps = np.ones(num) if math.isinf(burstiness) else np.random.default_rng(seed).gamma(burstiness, size=num)
    times: npt.NDArray[np.float64] = np.cumsum(gaps)
    # Left as it is the total would be some percents off, and throughput at a rate would depend on the seed.
    with np.errstate(all="ignore"):
        times *= num / rate / times[-1]
    if not np.isfinite(times).all():
        raise ConfigError(f"a rate of {rate:g} with a burstiness of {burstiness:g}: no times can be drawn; take more")
    return times


async def sharegpt_requests(
    file: Path, num: int, *, seed: int, output_len: int | None, count_tokens: Callable[[str], Awaitable[int]]
) -> list[LoadRequest]:
    """Draw first questions from a ShareGPT file: a JSON list of {"conversations": [{"value": ...}, ...]}.

    Args:
        file: to read.
        num: requests; all that fit, where there are fewer.
        seed: same seed, same requests.
        output_len: tokens of an answer; None: as many as the recorded answer has.
        count_tokens: text -> tokens.

    Raises:
        ConfigError: the file is none.
    """
    try:
        pairs = sharegpt_pairs(_json(_read(file)))
    except ValueError as error:
        raise ConfigError(f"--dataset-path {file}: {error}") from None
    requests: list[LoadRequest] = []
    for index in np.random.default_rng(seed).permutation(len(pairs)).tolist():
        prompt, recorded = pairs[index]
        num_prompt = await count_tokens(prompt)
        num_output = output_len if output_len is not None else await count_tokens(recorded)
        if min(num_prompt, num_output) < MIN_TOKENS or num_prompt > MAX_PROMPT_TOKENS:
            continue
        if num_prompt + num_output > MAX_TOTAL_TOKENS:
            continue
        requests.append(LoadRequest(prompt, num_output))
        if len(requests) == num:
            break
    return requests


def sharegpt_pairs(document: Any) -> list[tuple[str, str]]:
    """Return the first question and answer of every conversation that has them, in the order of the file.

    Args:
        document: a ShareGPT file, parsed.

    Raises:
        ValueError: it is none; says what one looks like.
    """
    try:
        return [
            (each["conversations"][0]["value"], each["conversations"][1]["value"])
            for each in document
            if len(each.get("conversations") or each.get("conversation") or ()) >= 2
        ]
    except (KeyError, TypeError, AttributeError):
        raise ValueError('is no ShareGPT file, a JSON list of {"conversations": [{"value": "..."}, ...]}') from None


def read_jsonl(file: Path, num: int, *, output_len: int) -> list[LoadRequest]:
    """Read the first requests of a file of one JSON object per line.

    Args:
        file: each line has "prompt" (a text or token ids) or "messages", and may have "max_tokens" (or
            "output_tokens").
        num: requests; all, where there are fewer.
        output_len: where a line does not say.

    Raises:
        ConfigError: a line is not such an object.
    """
    return [request for request, _ in zip(_lines(file, output_len), range(num), strict=False)]


def _lines(file: Path, output_len: int) -> Iterator[LoadRequest]:
    for number, line in enumerate(_read(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield _request(parse_json(line), output_len)
        except ValueError as error:
            raise ConfigError(f"--dataset-path {file}: line {number}: {error}") from None


def _request(record: Any, output_len: int) -> LoadRequest:
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise ValueError("allowed: an object with either prompt or messages")
    for key in record:
        if key not in ("prompt", "messages", *OUTPUT_KEYS):
            raise ValueError(f"unknown key {describe(key)}; allowed: prompt, messages, {', '.join(OUTPUT_KEYS)}")
    prompt = record.get("prompt", record.get("messages"))
    if not isinstance(prompt, (str, list)) or not prompt or ("messages" in record and isinstance(prompt, str)):
        raise ValueError(f"the prompt is {describe(prompt)}; allowed: a text, token ids, or messages")
    max_tokens = next((record[key] for key in OUTPUT_KEYS if key in record), output_len)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ValueError(f"max_tokens is {describe(max_tokens)}; allowed: an integer of at least 1")
    return LoadRequest(prompt, max_tokens)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--dataset-path {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--dataset-path {file}: is not UTF-8: {error.reason} at byte {error.start}") from None
