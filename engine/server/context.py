"""This module holds what the routes share: the engine's front, the settings, the names. It does not know any route."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..async_llm import AsyncLLM
from ..errors import CheckpointError, ConfigError, RequestError, describe
from ..observe.metrics import Metrics
from ..observe.ring import EventRing
from ..text import Tokenizer
from ..text.pieces import BytePieces
from .admission import Admission
from .errors import HTTPError
from .settings import ServerSettings

__all__ = [
    "Context",
    "EncodedPrompt",
    "check_ids",
    "check_model",
    "encode_messages",
    "encode_prompts",
    "encode_text",
    "model_names",
]

MAX_PROMPTS = 1024
_USUAL_CHARS = 16
"""A token has hardly ever more."""


@dataclass(frozen=True, slots=True)
class Context:
    """What every route is given."""

    llm: AsyncLLM
    settings: ServerSettings
    admission: Admission
    model_names: tuple[str, ...]
    """What the model is called; its answers bear the first."""
    ring: EventRing
    """The latest of what the engine did."""
    metrics: Metrics
    system_fingerprint: str
    """Changes with the model's weights and what they are run in."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When serving began, seconds since 1970."""
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    """All requests are answered, and what only watches shall end."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as ids, and the text it came as, where it did."""

    token_ids: list[int]
    text: str | None = None


def model_names(settings: ServerSettings, model: str) -> tuple[str, ...]:
    """Return the names the model answers to; of a path only its last part, which says nothing about the machine."""
    if settings.served_model_names:
        return settings.served_model_names
    is_path = Path(model).exists() or model.startswith(("/", ".", "~"))
    return (Path(model).resolve().name if is_path else model,)


def check_model(context: Context, name: str | None) -> None:
    """Check that the model is the one that is served; None asks for whichever it is.

    Raises:
        HTTPError: 404.
    """
    if name is not None and name not in context.model_names:
        raise HTTPError(
            404,
            f"there is no model {describe(name)}; allowed: {', '.join(context.model_names)}",
            param="model",
            code="model_not_found",
        )


async def encode_prompts(llm: AsyncLLM, prompt: Any) -> list[EncodedPrompt]:
    """Return the prompts of a completion: a text, token ids, or a list of either.

    Raises:
        RequestError: it is none of these, or an id is outside the model's logits.
    """
    one = isinstance(prompt, str) or (isinstance(prompt, list) and set(map(type, prompt)) == {int})
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROMPTS or len(set(map(type, prompts))) != 1:
        raise _no_prompt(prompt)
    encoded: list[EncodedPrompt] = []
    for each in prompts:
        if isinstance(each, str) and each:
            await _check_length(llm, each)
            with_ids = EncodedPrompt(await encode_text(llm, each), each)
        elif isinstance(each, list) and set(map(type, each)) == {int}:
            with_ids = EncodedPrompt(each)
        else:
            raise _no_prompt(prompt)
        _check_ids(with_ids.token_ids, llm.info.vocab_size, "prompt")
        encoded.append(with_ids)
    return encoded


async def _check_length(llm: AsyncLLM, text: str) -> None:
    """Refuse a text by its bytes that must have more tokens than the context, whatever they are."""
    max_model_len, tokenizer = llm.info.max_model_len, llm.tokenizer
    if tokenizer is None or len(text) <= _USUAL_CHARS * max_model_len:
        return
    longest = await asyncio.to_thread(_longest_token, tokenizer)
    num_bytes = len(text.encode(errors="replace"))
    if longest is not None and num_bytes > longest * max_model_len:
        raise RequestError(
            f"the prompt has {num_bytes} bytes; allowed: {longest * max_model_len}, more than which cannot be "
            f"{max_model_len} tokens",
            "prompt",
        )


@cache
def _longest_token(tokenizer: Tokenizer) -> int | None:
    """Return the bytes of the longest token; None where one token may stand for any number of bytes."""
    pieces = tokenizer.pieces(False)
    if not isinstance(pieces, BytePieces):
        return None
    return max(len(pieces[token_id]) for token_id in range(tokenizer.vocab_size))


async def encode_text(llm: AsyncLLM, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Encode one text.

    Raises:
        RequestError: it is no valid text, or the model has no tokenizer.
    """
    if add_special_tokens or llm.tokenizer is None:
        return await llm.encode(text)
    return await asyncio.to_thread(llm.tokenizer.encode, text, add_bos=False)


async def encode_messages(llm: AsyncLLM, messages: Any, **options: Any) -> list[int]:
    """Encode a conversation; see `AsyncLLM.encode_chat`.

    Raises:
        RequestError: it is not valid, or the model has no tokenizer or chat template.
    """
    try:
        return await llm.encode_chat(messages, **options)
    except (ConfigError, CheckpointError) as error:
        raise RequestError(str(error), "messages") from None


def check_ids(token_ids: list[Any], vocab_size: int, param: str) -> None:
    """Check token ids from a request.

    Raises:
        RequestError: something is no id of this model.
    """
    if set(map(type, token_ids)) - {int}:
        raise RequestError(f"{param} holds something else than integers; allowed: token ids", param)
    _check_ids(token_ids, vocab_size, param)


def _check_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    wrong = min(min(token_ids, default=0), vocab_size - 1 - max(token_ids, default=0)) < 0
    if wrong:
        first = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise RequestError(f"{param} holds {describe(first)}; allowed: token ids from 0 to {vocab_size - 1}", param)


def _no_prompt(prompt: Any) -> RequestError:
    allowed = f"a text, token ids, or a list of 1 to {MAX_PROMPTS} of either, none of them empty"
    return RequestError(f"prompt is {describe(prompt)}; allowed: {allowed}", "prompt")
