"""This module holds the flags of `octavo bench`, checked. It does not know what is done with them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, describe
from ..strict_json import parse_json
from .outputs import check_output

if TYPE_CHECKING:
    from ..tools.load import Load

__all__ = [
    "OBJECTIVES",
    "BenchOptions",
    "LatencyOptions",
    "OpOptions",
    "ThroughputOptions",
    "objectives_from",
]

OBJECTIVES = ("ttft", "tpot", "e2el")
_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "endpoint": ("completions", "chat"),
    "dataset": ("random", "sharegpt", "jsonl"),
    "dtype": (None, "float32", "float16", "bfloat16"),
    "backend": ("auto", "torch", "triton"),
}
_LEAST = {
    "num_prompts": 1,
    "input_len": 1,
    "output_len": 1,
    "prefix_len": 0,
    "num_warmups": 0,
    "num_rounds": 1,
    "num_iters": 1,
    "num_iters_warmup": 0,
    "seed": 0,
}


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What load to put on which server.

    Raises:
        ConfigError: a value is not allowed.
    """

    base_url: str = "http://127.0.0.1:8000"
    """The server."""
    endpoint: Literal["completions", "chat"] = "completions"
    """What to ask it for."""
    model: str | None = None
    """The model's name; not given: the server's first."""
    api_key_file: Path | None = None
    """Holds the key; not given: the variable OPENAI_API_KEY, if it is set."""
    dataset: Literal["random", "sharegpt", "jsonl"] = "random"
    """Where prompts come from."""
    dataset_path: Path | None = None
    """A ShareGPT file; or JSONL with prompt or messages in each line, and maybe max_tokens."""
    num_prompts: int = 100
    """Requests in each run."""
    input_len: int = 256
    """random: words of a prompt, each a token of most tokenizers."""
    output_len: int | None = None
    """Most tokens of an answer; not given: 128, or with sharegpt as many as the recorded answer has."""
    range_ratio: float = 0.0
    """random: lengths are drawn evenly from within this part of them, up and down."""
    prefix_len: int = 0
    """random: words in front that all prompts share."""
    request_rate: list[str] | None = None
    """Requests per second; several, as in 1,2,4, make a run each. Not given: all are sent at once."""
    burstiness: float = 1.0
    """Of arrivals: 1 is a Poisson process, less comes in bursts, inf is a metronome."""
    max_concurrency: list[str] | None = None
    """Most requests under way; several make a run each. Not given: no limit."""
    num_warmups: int = 1
    """Short requests before each run."""
    goodput: list[str] | None = None
    """Count the requests that keep within milliseconds: ttft:200 tpot:50 (or e2el)."""
    ignore_eos: bool = False
    """Ask for answers of full length."""
    temperature: float = 0.0
    """Of sampling; 0 is greedy."""
    extra_body: str | None = None
    """JSON with more fields for every request."""
    seed: int = 0
    """Of prompts and arrivals. A server may have the prompts of an earlier run in its cache: use another."""
    timeout: float = 600.0
    """Most seconds for one request."""
    save_result: Path | None = None
    """Write figures and raw times there, as JSON in vLLM's names."""
    compare: Path | None = None
    """Show what has changed since a saved result, of octavo or vLLM."""

    def __post_init__(self) -> None:
        _check_fields(self)
        _check(self, "burstiness", "a number above 0, or inf", lambda value: value > 0)
        _check(self, "timeout", "seconds above 0", lambda value: 0 < value < math.inf)

    @property
    def loads(self) -> list[Load]:
        """One load for each pair of a rate and a concurrency."""
        from ..tools.load import Load

        return [
            Load(math.inf if rate is None else rate, self.burstiness, concurrency, self.seed)
            for rate in _numbers("--request-rate", self.request_rate, float, "a number above 0, or inf")
            for concurrency in _numbers("--max-concurrency", self.max_concurrency, int, "an integer of at least 1")
        ]

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of every request's body."""
        try:
            extra = {} if self.extra_body is None else parse_json(self.extra_body)
        except ValueError as error:
            raise ConfigError(f"--extra-body: {error}") from None
        if not isinstance(extra, dict):
            raise ConfigError(f"--extra-body is {describe(extra)}; allowed: a JSON object")
        return {"temperature": self.temperature} | ({"ignore_eos": True} if self.ignore_eos else {}) | extra

    @property
    def api_key(self) -> str | None:
        """The key to send."""
        if self.api_key_file is None:
            return os.environ.get("OPENAI_API_KEY") or None
        try:
            words = self.api_key_file.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no ASCII"
            raise ConfigError(f"--api-key-file {self.api_key_file} cannot be read: {reason}") from None
        if not words:
            raise ConfigError(f"--api-key-file {self.api_key_file} holds no key")
        return words[0]


@dataclass(frozen=True, slots=True)
class ThroughputOptions:
    """What to run through an engine at once.

    Raises:
        ConfigError: a value is not allowed.
    """

    dataset: Literal["random", "sharegpt", "jsonl"] = "random"
    """Where prompts come from."""
    dataset_path: Path | None = None
    """A ShareGPT file; or JSONL with prompt or messages in each line, and maybe max_tokens."""
    num_prompts: int = 100
    """Requests in each round."""
    input_len: int = 256
    """random: tokens of a prompt."""
    output_len: int | None = None
    """Tokens of every answer; not given: 128, or with sharegpt as many as the recorded answer has."""
    range_ratio: float = 0.0
    """random: lengths are drawn evenly from within this part of them, up and down."""
    prefix_len: int = 0
    """random: tokens in front that all prompts share."""
    num_rounds: int = 3
    """How often to run them all; several tell how much a figure varies by itself."""
    temperature: float = 0.0
    """Of sampling; 0 is greedy."""
    seed: int = 0
    """Of the prompts."""
    save_result: Path | None = None
    """Write all figures there, as JSON in vLLM's names."""
    compare: Path | None = None
    """Show what has changed since a saved result."""

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, slots=True)
class LatencyOptions:
    """What batches to run, one at a time.

    Raises:
        ConfigError: a value is not allowed.
    """

    batch_size: list[str] | None = None
    """Sequences that run together; several, as in 1,8,32, take turns. Not given: 8."""
    input_len: int = 32
    """Tokens of each prompt."""
    output_len: int = 128
    """Tokens of each answer."""
    num_iters: int = 30
    """Batches of each size that are timed."""
    num_iters_warmup: int = 3
    """Batches of each size before that."""
    temperature: float = 0.0
    """Of sampling; 0 is greedy."""
    seed: int = 0
    """Of the prompts."""
    save_result: Path | None = None
    """Write all figures there, as JSON in vLLM's names; a list, where there are several batch sizes."""
    compare: Path | None = None
    """Show what has changed since a saved result."""

    def __post_init__(self) -> None:
        _check_fields(self)

    @property
    def batch_sizes(self) -> list[int]:
        """Every batch size."""
        return _numbers("--batch-size", self.batch_size or ["8"], int, "an integer of at least 1")


@dataclass(frozen=True, slots=True)
class OpOptions:
    """Which ops to time.

    Raises:
        ConfigError: a value is not allowed.
    """

    op: list[str] | None = None
    """An op of octavo.kernels, such as rms_norm; several with commas. Not given: all."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """Whose ops to time: the torch reference or the Triton kernels."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the inputs; not given: each case's own."""
    num_rounds: int = 5
    """How often the cases take turns; several tell how much a figure varies by itself."""
    save_result: Path | None = None
    """Write all figures there, as JSON."""
    compare: Path | None = None
    """Show what has changed since a saved result."""

    def __post_init__(self) -> None:
        _check_fields(self)


def objectives_from(words: Sequence[str]) -> dict[str, float]:
    """Return milliseconds by metric of words such as ttft:200.

    Raises:
        ConfigError: a word is not such.
    """
    found: dict[str, float] = {}
    for word in " ".join(words).replace(",", " ").split():
        name, _, text = word.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if name not in OBJECTIVES or not limit >= 0:
            names = ", ".join(OBJECTIVES)
            raise ConfigError(f"--goodput is {describe(word)}; allowed: one of {names}, a colon and milliseconds")
        found[name] = limit
    return found


def _numbers(flag: str, words: list[str] | None, kind: Callable[[str], Any], allowed: str) -> list[Any]:
    """Return the numbers of a flag that is given several times, or once with commas; [None] where it is not given."""
    if words is None:
        return [None]
    numbers = []
    for word in ",".join(words).split(","):
        try:
            numbers.append(kind(word))
        except ValueError:
            numbers.append(math.nan)
        if not numbers[-1] > 0:
            raise ConfigError(f"{flag} is {describe(word)}; allowed: {allowed}; several with commas between")
    return numbers


def _check(options: Any, name: str, allowed: str, ok: Callable[[Any], bool]) -> None:
    if not ok(value := getattr(options, name)):
        raise ConfigError(f"--{name.replace('_', '-')} is {describe(value)}; allowed: {allowed}")


def _check_fields(options: Any) -> None:
    """Check what several verbs have, by its name."""
    names = [each.name for each in fields(options)]
    for name in names:
        if name in _CHOICES:
            allowed = ", ".join(each for each in _CHOICES[name] if each is not None)
            _check(options, name, allowed, _CHOICES[name].__contains__)
        if name in _LEAST and getattr(options, name) is not None:
            least = _LEAST[name]
            _check(options, name, f"an integer from {least} to 2**31 - 1", range(least, 2**31).__contains__)
    if "range_ratio" in names:
        _check(options, "range_ratio", "a number from 0 to 1", lambda value: 0 <= value <= 1)
    if "temperature" in names:
        _check(options, "temperature", "a number from 0 to 2", lambda value: 0 <= value <= 2)
    if "dataset" in names and (options.dataset == "random") == (options.dataset_path is not None):
        needs = "takes no" if options.dataset == "random" else "needs a"
        raise ConfigError(f"--dataset {options.dataset} {needs} --dataset-path")
    check_output("--save-result", options.save_result)
