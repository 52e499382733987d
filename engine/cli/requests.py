"""This module holds the reading of requests from arguments, text and JSONL. It does not know the engine.

A line that is no valid request becomes a `BadRequest` in its place, so that the others are not lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

from ..errors import ConfigError, RequestError
from ..sampling_params import RULES, SamplingParams
from ..strict_json import parse_json

__all__ = ["BadRequest", "BatchRequest", "Kind", "RequestId", "Requests", "read_lines"]

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
MAX_LINE_BYTES = 64 << 20
MAX_ID_CHARS = 256
MAX_BAD_HEAD = 100
"""So many bad lines before the first good one, and the file is taken for something else than JSONL."""

RequestId = int | str
Kind = Literal["jsonl", "text", "argument"]


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a batch."""

    id: RequestId
    line: int
    """Its number in the input, from 1."""
    place: str
    """The same in words: "line 3"."""
    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]
    params: SamplingParams
    digest: str
    """Of what the line itself says; 16 hex digits."""


@dataclass(frozen=True, slots=True)
class BadRequest:
    """A line that cannot be run."""

    id: RequestId | None
    """None where the id belongs to another line."""
    line: int
    error: str


class Requests:
    """Reads requests one by one; `line_of` grows with them.

    Args:
        lines: raw lines, numbered from 1 by their order.
        kind: what a line is; empty ones are left out.
        sampling: parameters for every request; a JSONL line's own go before them.
        chat: make plain prompts a user's message.
        seed: requests without a seed get one from it and their id, so that a resumed run goes on as one never stopped.
    """

    def __init__(
        self, lines: Iterable[bytes], kind: Kind, *, sampling: Mapping[str, Any], chat: bool, seed: int
    ) -> None:
        self.line_of: dict[RequestId, int] = {}
        """Every id met so far and its line."""
        self._lines = lines
        self._parse: Callable[[str, int], BatchRequest | BadRequest] = (
            self._parse_json_line if kind == "jsonl" else self._parse_text_line
        )
        self._place = "prompt" if kind == "argument" else "line"
        self._sampling = dict(sampling)
        self._shared_params = SamplingParams.from_mapping(sampling)
        self._chat = chat
        self._seed = seed

    def __iter__(self) -> Iterator[BatchRequest | BadRequest]:
        for number, raw in enumerate(self._lines, 1):
            if len(raw) > MAX_LINE_BYTES:
                yield self._bad(number, number, f"has {len(raw):,} bytes; allowed: at most {MAX_LINE_BYTES:,}")
                continue
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield self._bad(number, number, f"is not UTF-8 at byte {error.start}")
                continue
            if self._place == "line":
                text = text.rstrip("\r\n")
            if text.strip() or self._place == "prompt":
                yield self._parse(text, number)

    def head(self, file: Path) -> Iterator[BatchRequest | BadRequest]:
        """Return all requests, once it is sure that there are some.

        Raises:
            ConfigError: the file holds no request, or looks like no JSONL at all.
        """
        requests = iter(self)
        start: list[BatchRequest | BadRequest] = []
        for request in requests:
            start.append(request)
            if isinstance(request, BatchRequest) or len(start) == MAX_BAD_HEAD:
                break
        if not start:
            raise ConfigError(f"{file} holds no request; write one per line")
        if all(isinstance(each, BadRequest) for each in start):
            first = start[0]
            assert isinstance(first, BadRequest), "all are"
            raise ConfigError(
                f"{file} cannot be used: none of its first {len(start)} lines is a request; {first.error}. "
                'Write {"prompt": "..."} per line, or plain prompts in a file that ends in .txt'
            )
        return chain(start, requests)

    def _parse_text_line(self, text: str, number: int) -> BatchRequest | BadRequest:
        self.line_of[number] = number
        return self._request(number, number, text, {})

    def _parse_json_line(self, text: str, number: int) -> BatchRequest | BadRequest:
        try:
            entry = parse_json(text)
        except ValueError as error:
            return self._bad(number, number, f"is no JSON: {error}")
        if not isinstance(entry, dict):
            return self._bad(number, number, "is no JSON object")
        request_id = entry.pop("id", None)
        if request_id is None:
            request_id = number
        if not _is_id(request_id):
            allowed = f"an integer, or a string of 1 to {MAX_ID_CHARS} characters"
            return self._bad(None, number, f"id is {ascii(request_id)[:40]}; allowed: {allowed}")
        if request_id in self.line_of:
            first = self.line_of[request_id]
            return self._bad(None, number, f"id {request_id!a} is that of line {first} already")
        self.line_of[request_id] = number
        unknown = [key for key in entry if key not in RULES and key not in PROMPT_KEYS]
        if unknown:
            allowed = ", ".join(("id", *PROMPT_KEYS, *RULES))
            return self._bad(request_id, number, f"unknown key {unknown[0][:64]!a}; allowed: {allowed}")
        prompts = {key: entry.pop(key) for key in PROMPT_KEYS if entry.get(key) is not None}
        if len(prompts) != 1:
            found = ", ".join(prompts) or "none"
            return self._bad(request_id, number, f"has {found}; allowed: one of {', '.join(PROMPT_KEYS)}")
        ((key, prompt),) = prompts.items()
        kind = str if key == "prompt" else list
        if not isinstance(prompt, kind) or not prompt:
            wanted = {"prompt": "a string", "prompt_token_ids": "a list of token ids", "messages": "a list of messages"}
            return self._bad(request_id, number, f"{key} is {ascii(prompt)[:40]}; allowed: {wanted[key]}, not empty")
        return self._request(request_id, number, prompt, {name: entry[name] for name in entry if name in RULES})

    def _request(
        self, request_id: RequestId, number: int, prompt: Any, own: Mapping[str, Any]
    ) -> BatchRequest | BadRequest:
        try:
            params = SamplingParams.from_mapping({**self._sampling, **own}) if own else self._shared_params
        except RequestError as error:
            return self._bad(request_id, number, str(error))
        said = json.dumps([prompt, own], sort_keys=True)
        if params.seed is None:
            params = params.replace(seed=_digest(json.dumps([self._seed, request_id])) >> 1)
        if self._chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return BatchRequest(request_id, number, f"{self._place} {number}", prompt, params, f"{_digest(said):016x}")

    def _bad(self, request_id: RequestId | None, number: int, what: str) -> BadRequest:
        if request_id is not None and self.line_of.setdefault(request_id, number) != number:
            request_id = None
        return BadRequest(request_id, number, f"{self._place} {number}: {what}")


def read_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file; of one longer than is allowed, only that much, the rest being skipped."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)


def _is_id(value: Any) -> bool:
    if isinstance(value, str):
        return 1 <= len(value) <= MAX_ID_CHARS
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= 64


def _digest(text: str) -> int:
    """Return 64 bits that tell texts apart, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
