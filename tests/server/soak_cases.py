"""This module holds requests of every kind with the one answer that each must get. It does not know who asks."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.engine.llm import LLM
from octavo.engine.process.fake import ALPHABET, fake_tokenizer
from octavo.engine.runner.fake_runner import reference_tokens
from octavo.engine.step import CompletionOutput
from octavo.engine.text import ChatTemplate

__all__ = ["BAD", "Bad", "Case", "Expected", "fake_case", "long_case", "tiny_cases"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Expected:
    """One choice of an answer."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A request without what concerns only the form of its answer."""

    path: str
    body: dict[str, Any]
    choices: list[Expected]
    num_prompt_tokens: int
    num_sequence_prompt_tokens: int
    """Counted once for each choice, as the engine's metrics do."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A request that must be refused."""

    status: int
    body: bytes
    path: str = COMPLETIONS
    method: str = "POST"
    headers: tuple[str, ...] = ()


def _bad(status: int = 400, path: str = COMPLETIONS, **changes: Any) -> Bad:
    prompt = {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    return Bad(status, json.dumps(prompt | changes).encode(), path)


BAD: Sequence[Bad] = (
    _bad(temperature=float("nan")),
    _bad(temperature=3),
    _bad(top_p=0),
    _bad(max_tokens=0),
    _bad(max_tokens=10**30),
    _bad(n=10**9),
    _bad(seed=-1),
    _bad(stop=""),
    _bad(prompt=""),
    _bad(prompt=[]),
    _bad(prompt=[1, -1]),
    _bad(prompt=[1 << 31]),
    _bad(prompt="\ud800"),
    _bad(prompt="long " * 10_000),
    _bad(logit_bias={"100000": 1}),
    _bad(structured_outputs={"regex": "("}),
    _bad(no_such_field=1),
    _bad(404, model="another"),
    _bad(path=CHAT, messages=[]),
    _bad(path=CHAT, messages=[{"role": "nobody", "content": "a"}]),
    _bad(path=CHAT, n=0, stream=True),
    Bad(400, b'{"prompt": '),
    Bad(400, b'{"prompt": "\xff"}'),
    Bad(400, b'{"prompt": "a", "prompt": "a"}'),
    Bad(413, b" " * 70_000),
    Bad(415, b'{"prompt": "a"}', headers=("Content-Type: text/plain",)),
    Bad(404, b"{}", "/v1/nothing"),
    Bad(405, b"", method="DELETE"),
    Bad(431, b"{}", headers=tuple(f"X-{index}: 1" for index in range(101))),
)
"""For a server whose `body_bytes` are 65,536."""

_TOKENIZER = fake_tokenizer()
_TEMPLATE = ChatTemplate(_TOKENIZER)
_SHARED = [[random.Random(number).randrange(ALPHABET) for _ in range(400)] for number in range(4)]
"""Beginnings of prompts, so that there is something to find in the prefix cache."""


def fake_case(rng: random.Random, *, max_prompt: int, max_output: int) -> Case:
    """Draw a request of a fake model; nobody gets the same twice."""
    prompt = rng.choice(_SHARED)[: rng.randrange(max_prompt)] + [
        rng.randrange(ALPHABET) for _ in range(rng.randrange(1, 40))
    ]
    text, kind = _TOKENIZER.decode(prompt), rng.choice(("text", "ids", "several", "chat"))
    body: dict[str, Any] = {"max_tokens": rng.randint(1, max_output), "seed": rng.getrandbits(40)}
    body["n"] = rng.choice((1, 1, 1, 2, 4))
    if kind == "chat":
        body["messages"] = [{"role": "system", "content": text[:20]}, {"role": "user", "content": f"é {text}"}]
        prompts = [_TEMPLATE.encode(body["messages"])]
    elif kind == "several":
        body["prompt"] = [text, text + "!"]
        prompts = [prompt, [*prompt, 0]]
    else:
        body["prompt"] = text if kind == "text" else prompt
        prompts = [prompt]
    end = rng.choice(("length", "length", "string", "token"))
    if end == "string":
        body["stop"] = [_TOKENIZER.decode([rng.randrange(ALPHABET)]) for _ in range(rng.randint(1, 4))]
    elif end == "token":
        body["stop_token_ids"] = [rng.randrange(1, ALPHABET) for _ in range(4)]
        body["min_tokens"] = rng.randint(0, body["max_tokens"])
    choices = [_fake_choice(prompt, index, body) for prompt in prompts for index in range(body["n"])]
    num_tokens = sum(map(len, prompts))
    return Case(CHAT if kind == "chat" else COMPLETIONS, body, choices, num_tokens, num_tokens * body["n"])


def long_case(num_tokens: int, *, seed: int, n: int = 1, llm: LLM | None = None) -> Case:
    """Return a request for long answers, of a fake model or of the one given."""
    prompt = list(range(seed % 50, seed % 50 + 30))
    sampling = {"max_tokens": num_tokens, "seed": seed, "n": n, "ignore_eos": True, "logprobs": 1}
    if llm is None:
        choices = [_fake_choice(prompt, index, sampling) for index in range(n)]
    else:
        choices = list(map(_tiny_choice, llm.generate(prompt, llm.params(sampling))[0].outputs))
    return Case(COMPLETIONS, sampling | {"prompt": prompt}, choices, len(prompt), n * len(prompt))


def _fake_choice(prompt: Sequence[int], index: int, body: dict[str, Any]) -> Expected:
    ends = frozenset(body.get("stop_token_ids", ()))
    token_ids = reference_tokens(
        prompt,
        body["max_tokens"],
        seed=body["seed"],
        index=index,
        alphabet=ALPHABET,
        min_tokens=body.get("min_tokens", 0),
        stop_token_ids=ends,
    )
    text = _TOKENIZER.decode(token_ids)
    if token_ids[-1] in ends and len(token_ids) >= body.get("min_tokens", 0):
        return Expected(text[:-1], token_ids, "stop", token_ids[-1])
    # Stop strings are single characters, and characters are tokens.
    place, stop = min(((text.find(stop), stop) for stop in body.get("stop", ()) if stop in text), default=(0, None))
    if stop is not None:
        return Expected(text[:place], token_ids[: place + 1], "stop", stop)
    return Expected(text, token_ids, "length")


def tiny_cases(llm: LLM, seed: int, num_cases: int) -> list[Case]:
    """Draw requests of a model and ask it for the answers, one at a time."""
    rng = random.Random(seed)
    return [_tiny_case(llm, rng, TINY_PARAMS[number % len(TINY_PARAMS)]) for number in range(num_cases)]


_SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y", 3]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TINY_PARAMS: Sequence[dict[str, Any]] = (
    {"temperature": 0.0},
    {"n": 3},
    {"temperature": 0.0, "structured_outputs": {"choice": ["yes", "no", "perhaps"]}},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "stop": "?"},
    {"structured_outputs": {"regex": "[0-9]{2,6}(-[a-f]+)?"}, "n": 2},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 8},
    {"structured_outputs": {"json": _SCHEMA}, "max_tokens": 60},
    {"logit_bias": {"70": 3.0, "64": -100.0}, "min_p": 0.05, "stop": "?"},
    {"structured_outputs": {"grammar": 'start: "(" ("a" | "b")+ ")"'}, "n": 2, "stop": "?"},
    {"ignore_eos": True, "bad_words": ["th"], "stop_token_ids": [65, 66]},
)


def _tiny_case(llm: LLM, rng: random.Random, params: dict[str, Any]) -> Case:
    sampling = {"max_tokens": rng.randint(4, 40), "seed": rng.getrandbits(40)} | params
    text = "".join(rng.choice("abcdeth in\n?é") for _ in range(rng.randrange(1, 120)))
    messages = [{"role": "user", "content": text}] if rng.random() < 0.5 else None

    def ask() -> Any:
        asked = llm.params(sampling)
        return (llm.generate([text], asked) if messages is None else llm.chat([messages], asked))[0]

    if sampling.pop("stop", None) is not None:
        whole = ask().outputs[0].text
        place = rng.randrange(len(whole) - 1) if len(whole) > 1 else 0
        sampling["stop"] = [whole[place : place + 2] or "none"]
    answer = ask()
    num_tokens = len(answer.prompt_token_ids)
    body = sampling | ({"prompt": text} if messages is None else {"messages": messages})
    choices = list(map(_tiny_choice, answer.outputs))
    return Case(COMPLETIONS if messages is None else CHAT, body, choices, num_tokens, num_tokens * len(choices))


def _tiny_choice(choice: CompletionOutput) -> Expected:
    assert choice.finish_reason in ("stop", "length")
    return Expected(choice.text, choice.token_ids, str(choice.finish_reason), choice.stop_reason)
