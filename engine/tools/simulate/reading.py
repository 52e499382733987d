"""This module holds where workloads come from: a few words, a file with times and sizes, conversations, a recording of
a server. It does not know how they are run.

    poisson:rate=8,n=10000,input=512,output=128     arrivals at random; rate=inf: all at once
    burst:size=64,every=10,n=640,input=...          so many at once, every so many seconds
    requests.jsonl                                  one object a line, see `_KEYS`; Mooncake's traces are such
    conversations.json                              ShareGPT: a list of {"conversations": [{"value": ...}, ...]}
    recording.json                                  what `octavo serve` has recorded: times and sizes of its requests

Lengths are a number, FROM-TO (even), lognormal:MEDIAN:SIGMA[:MAX] or exponential:MEAN[:MAX].
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, describe
from ...events import EventKind
from ...observe.recording import loads
from ...strict_json import parse_json
from ..workload import MAX_PROMPT_TOKENS, MAX_TOTAL_TOKENS, MIN_TOKENS, gamma_arrivals, sharegpt_pairs
from .workload import DrawnPrompts, FloatArray, HashedPrompts, IntArray, KnownPrompts, Prompts, Workload

__all__ = ["Encode", "read_workload"]

Encode = Callable[[str], Sequence[int]]

SHAREGPT = {"input": "lognormal:101:1:1024", "output": "lognormal:237:1:1024"}
"""With the means of Kwon et al. 2023 (https://arxiv.org/abs/2309.06180), figure 11: 161 and 338 tokens; the shape is a
choice."""
_KINDS: Mapping[str, Mapping[str, str]] = {
    "poisson": {"rate": "", "burstiness": "1"},
    "burst": {"size": "", "every": ""},
}
_COMMON = {"n": "1000", "input": "512", "output": "128", "prefix": "0", "prefixes": "1", "seed": "0", "like": ""}
_KEYS = ("arrival_s", "prompt", "prompt_tokens", "output_tokens", "hash_ids")
"""Of a line; hash_ids name blocks of 512 tokens."""
_ALIASES = {
    "timestamp": "arrival_s",
    "messages": "prompt",
    "input_length": "prompt_tokens",
    "output_length": "output_tokens",
    "max_tokens": "output_tokens",
}
"""What others call them; a timestamp is in milliseconds."""
MAX_TOKENS = 1 << 24
MAX_SECONDS = 1e12
_LIMITS: Mapping[str, tuple[float, float]] = {
    "rate": (1e-9, math.inf),
    "burstiness": (1e-3, math.inf),
    "every": (0, 1e9),
    "size": (1, MAX_TOKENS),
    "n": (1, MAX_TOKENS),
    "prefix": (0, MAX_TOKENS),
    "prefixes": (1, MAX_TOKENS),
    "seed": (0, 2**31 - 1),
}
"""Least and most; where the most is an integer, the value is."""
CHARACTERS_PER_TOKEN = 4


def read_workload(text: str, encode: Encode | None = None, *, seed: int = 0, most: int | None = None) -> Workload:
    """Return the workload that a few words or a file describe.

    Args:
        text: see above.
        encode: text -> token ids; None: four characters are taken to be a token.
        seed: of the order in which conversations come.
        most: requests; all, where there are fewer.

    Raises:
        ConfigError: it is none, or cannot be read.
    """
    kind, _, words = text.partition(":")
    if kind in _KINDS:
        return _drawn(text, kind, words, most)
    file = Path(text)
    try:
        data = file.read_text(encoding="utf-8")
    except OSError as error:
        kinds = ", ".join(f"{kind}:..." for kind in _KINDS)
        raise ConfigError(f"the workload {text}: {error.strerror}; allowed: a file, {kinds}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the workload {file}: is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        if data.lstrip()[:1] == "[":
            return _conversations(file.name, data, encode, seed, most)
        if '"octavo_recording"' in data[:100]:
            return _recorded(file.name, data, most)
        return _lines(file.name, data, encode, most)
    except ValueError as error:
        raise ConfigError(f"the workload {file}: {error}") from None


def _drawn(text: str, kind: str, words: str, most: int | None) -> Workload:
    given = {name: value for name, _, value in (word.partition("=") for word in words.split(",") if word)}
    allowed = {**_KINDS[kind], **_COMMON}
    for name, value in given.items():
        if name not in allowed or not value:
            raise ConfigError(f"the workload {text}: {describe(name)}; allowed: {', '.join(f'{n}=' for n in allowed)}")
    if given.get("like", "sharegpt") != "sharegpt":
        raise ConfigError(f"the workload {text}: like is {describe(given['like'])}; allowed: sharegpt")
    values = {**allowed, **(SHAREGPT if "like" in given else {}), **given}
    if missing := [name for name in _KINDS[kind] if not values[name]]:
        raise ConfigError(f"the workload {text}: {missing[0]}= is missing")

    def number(name: str) -> float:
        least, most = _LIMITS[name]
        try:
            value = float(values[name])
        except ValueError:
            value = math.nan
        if not least <= value <= most or (isinstance(most, int) and value != int(value)):
            kind = "an integer" if isinstance(most, int) else "a number"
            allowed = f"{kind} from {least:g} " + (f"to {most:,}" if most < math.inf else "on, or inf")
            raise ConfigError(f"the workload {text}: {name} is {describe(values[name])}; allowed: {allowed}")
        return value

    num, seed = int(number("n")), int(number("seed"))
    num = num if most is None else min(num, most)
    rng = np.random.default_rng((seed, 1))
    try:
        inputs, outputs = (_lengths(values[name], num, rng) for name in ("input", "output"))
    except ValueError as error:
        raise ConfigError(f"the workload {text}: {error}") from None
    arrival_s: FloatArray
    if kind == "poisson":
        arrival_s = gamma_arrivals(num, number("rate"), number("burstiness"), seed)
    else:
        arrival_s = np.arange(num) // int(number("size")) * np.float64(number("every"))
    prefix = int(number("prefix"))
    prefixes = rng.integers(0, int(number("prefixes")), num)
    return Workload(text, arrival_s, inputs + prefix, outputs, DrawnPrompts(prefix, prefixes))


def _lengths(text: str, num: int, rng: np.random.Generator) -> IntArray:
    kind, *words = text.split(":")
    try:
        if kind == "lognormal":
            median, sigma, *limit = map(float, words)
            drawn = rng.lognormal(math.log(median), sigma, num)
        elif kind == "exponential":
            mean, *limit = map(float, words)
            drawn = rng.exponential(mean, num)
        else:
            low, _, high = kind.partition("-")
            limit = [int(high or low), *map(float, words)]
            drawn = rng.integers(int(low), int(high or low), num, endpoint=True).astype(float)
            if int(low) < 1:
                raise ValueError
        (most,) = limit or [MAX_TOKENS]
        if not 1 <= most <= MAX_TOKENS or np.isnan(drawn).any():
            raise ValueError
        return np.clip(np.rint(drawn), 1, most).astype(np.int64)
    except ValueError:
        raise ValueError(
            f"a length is {describe(text)}; allowed: 512, 100-1000, lognormal:MEDIAN:SIGMA[:MAX], "
            "exponential:MEAN[:MAX]"
        ) from None


def _conversations(name: str, data: str, encode: Encode | None, seed: int, most: int | None) -> Workload:
    pairs = sharegpt_pairs(parse_json(data))
    ids, outputs, num_left = [], [], 0
    for index in np.random.default_rng(seed).permutation(len(pairs)).tolist():
        prompt, answer = (_encoded(each, encode) for each in pairs[index])
        fits = min(len(prompt), len(answer)) >= MIN_TOKENS and len(prompt) <= MAX_PROMPT_TOKENS
        if not fits or len(prompt) + len(answer) > MAX_TOTAL_TOKENS:
            num_left += 1
            continue
        ids.append(prompt)
        outputs.append(len(answer))
        if len(ids) == most:
            break
    if not ids:
        raise ValueError("holds no conversation that fits")
    notes = [*_estimate(encode)]
    if num_left:
        limits = f"under {MIN_TOKENS} tokens, prompts over {MAX_PROMPT_TOKENS}, or over {MAX_TOTAL_TOKENS} in all"
        notes.append(f"{num_left:,} conversations left out: {limits}")
    lengths = np.array([len(each) for each in ids])
    return Workload(name, np.zeros(len(ids)), lengths, np.array(outputs), KnownPrompts(ids), tuple(notes))


def _encoded(text: Any, encode: Encode | None) -> Any:
    if not isinstance(text, str):
        raise ValueError(f"a text is {describe(text)}")
    if encode is not None:
        return np.array(encode(text), dtype=np.int32)
    pieces = (text[i : i + CHARACTERS_PER_TOKEN] for i in range(0, len(text), CHARACTERS_PER_TOKEN))
    return np.array([zlib.crc32(each.encode("utf-8", "replace")) & 0x7FFFFFFF for each in pieces], dtype=np.int32)


def _estimate(encode: Encode | None) -> Sequence[str]:
    return () if encode is not None else (f"no tokenizer: {CHARACTERS_PER_TOKEN} characters are taken to be a token",)


def _lines(name: str, data: str, encode: Encode | None, most: int | None) -> Workload:
    records: list[tuple[float, Any, int, Any]] = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip() and (most is None or len(records) < most):
            try:
                records.append(_record(parse_json(line), encode))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    if not records:
        raise ValueError("holds no request")
    records.sort(key=lambda record: record[0])  # stable: those of one time keep their order
    times, prompts, outputs, blocks = zip(*records, strict=True)
    if any(map(math.isnan, times)) and not all(map(math.isnan, times)):
        raise ValueError("some requests have arrival_s and some have not")
    arrival_s = np.nan_to_num(np.array(times) - times[0])
    lengths = np.array([each if isinstance(each, int) else len(each) for each in prompts])
    kinds = {"hash_ids" if names is not None else type(each) for names, each in zip(blocks, prompts, strict=True)}
    if len(kinds) > 1:
        raise ValueError("some requests have a prompt, some only its size or hash_ids; allowed: all alike")
    source: Prompts
    if blocks[0] is not None:
        source = HashedPrompts(blocks)
    elif isinstance(prompts[0], int):
        source = DrawnPrompts(0, np.zeros(len(records), dtype=np.int64))
    else:
        source = KnownPrompts(prompts)
    notes = _estimate(encode) if '"prompt"' in data or '"messages"' in data else ()
    return Workload(name, arrival_s, lengths, np.array(outputs), source, tuple(notes))


def _record(record: Any, encode: Encode | None) -> tuple[float, Any, int, Any]:
    """Return arrival in seconds or NaN, prompt or its size, output size, names of blocks or None."""
    if not isinstance(record, dict):
        raise ValueError(f"is {describe(record)}; allowed: an object")
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = _ALIASES.get(key, key)
        if name not in _KEYS or name in found:
            known = ", ".join((*_KEYS, *_ALIASES))
            raise ValueError(f"{'a second ' if name in found else 'unknown '}key {describe(key)}; allowed: {known}")
        found[name] = value
    time = found.get("arrival_s", math.nan)
    if "arrival_s" in found and (type(time) not in (int, float) or not 0 <= time <= MAX_SECONDS):
        raise ValueError(f"arrival_s is {describe(time)}; allowed: a number from 0 to {MAX_SECONDS:g}")
    if ("prompt" in found) == ("prompt_tokens" in found):
        raise ValueError("allowed: either prompt or prompt_tokens")
    size: Any = found.get("prompt_tokens", 1)
    prompt: Any = found.get("prompt", size)
    if "prompt_tokens" in found:
        size = _size("prompt_tokens", size)
    elif isinstance(prompt, list) and prompt and all(type(each) is int and 0 <= each < 2**31 for each in prompt):
        prompt = np.array(prompt, dtype=np.int32)
    else:
        prompt = _encoded(prompt if isinstance(prompt, str) else _messages_text(prompt), encode)
        if not len(prompt):
            raise ValueError("the prompt is empty")
    names = found.get("hash_ids")
    if names is not None:
        good = isinstance(names, list) and all(type(each) is int and each >= 0 for each in names)
        if not good or "prompt_tokens" not in found or len(names) * HashedPrompts.BLOCK_TOKENS < size:
            allowed = "an integer of at least 0 for every 512 tokens of the prompt"
            raise ValueError(f"hash_ids is {describe(names)}; allowed: {allowed}")
    seconds = float(time) / (1000 if "timestamp" in record else 1)
    return seconds, prompt, _size("output_tokens", found.get("output_tokens")), names


def _messages_text(messages: Any) -> str:
    try:
        return "\n".join(f"{each['role']}: {each['content']}" for each in messages)
    except (TypeError, KeyError):
        raise ValueError(f"the prompt is {describe(messages)}; allowed: a text, token ids, or messages") from None


def _size(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        raise ValueError(f"{key} is {describe(value)}; allowed: an integer from 1 to {MAX_TOKENS}")
    return value


def _recorded(name: str, data: str, most: int | None) -> Workload:
    recording = loads(data)
    arrived: dict[tuple[str, int], tuple[float, int]] = {}
    found: list[tuple[float, int, int]] = []
    for event in recording.ring.events:
        key = (event.request_id, event.choice)
        if event.kind == EventKind.ARRIVED:
            arrived[key] = (event.time_s, event.num_tokens)
        elif event.kind == EventKind.FINISHED and event.num_tokens and key in arrived:
            found.append((*arrived.pop(key), event.num_tokens))
    found = sorted(found)[:most]
    if not found:
        raise ValueError("has no request whose arrival and end are both in it")
    times, prompts, outputs = (np.array(column) for column in zip(*found, strict=True))
    notes = ["a recording has no prompts, so none of them share a prefix here"]
    if arrived:
        notes.append(f"{len(arrived):,} requests left out: they had no output, or had not ended")
    source = DrawnPrompts(0, np.zeros(len(found), dtype=np.int64))
    return Workload(name, times - times[0], prompts, outputs, source, tuple(notes))
