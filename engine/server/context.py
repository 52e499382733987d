"""This module holds what the routes share: the engine's front, the settings, the names. It does not know any route."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..async_llm import AsyncLLM
from ..errors import CheckpointError, ConfigError, RequestError, describe
from ..intake import check_ids
from ..observe.metrics import Metrics
from ..observe.ring import EventRing
from .admission import Admission
from .errors import HTTPError
from .fields import MAX_PROMPTS, MAX_TOKEN_IDS
from .settings import ServerSettings

__all__ = [
    "Context",
    "EncodedPrompt",
    "check_model",
    "encode_messages",
    "encode_prompts",
    "model_names",
]


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
            encoded.append(EncodedPrompt(await llm.encode(each), each))
        elif isinstance(each, list) and 1 <= len(each) <= MAX_TOKEN_IDS and set(map(type, each)) == {int}:
            check_ids(each, llm.info.vocab_size, "prompt")
            encoded.append(EncodedPrompt(each))
        else:
            raise _no_prompt(prompt)
    return encoded


async def encode_messages(llm: AsyncLLM, messages: Any, **options: Any) -> list[int]:
    """Encode a conversation; see `AsyncLLM.encode_chat`.

    Raises:
        RequestError: it is not valid, or the model has no tokenizer or chat template.
    """
    try:
        return await llm.encode_chat(messages, **options)
    except (ConfigError, CheckpointError) as error:
        raise RequestError(str(error), "messages") from None


def _no_prompt(prompt: Any) -> RequestError:
    allowed = f"a text, token ids, or a list of 1 to {MAX_PROMPTS} of either, none of them empty"
    return RequestError(f"prompt is {describe(prompt)}; allowed: {allowed}", "prompt")
