"""This module holds /tokenize and /detokenize. It does not know sampling."""

from __future__ import annotations

from typing import Any

import msgspec

from ..errors import RequestError
from ..intake import check_ids
from ..text import Tokenizer
from .body import read_object, send_response
from .context import Context, check_model, encode_messages
from .exchange import Exchange, Receive, Scope, Send
from .fields import DETOKENIZE, TOKENIZE, read_fields
from .logprobs import TokenTexts
from .watch import Watch

__all__ = ["Detokenize", "Tokenize"]


class Tokenize:
    """The route from a text or a conversation to token ids."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._texts = TokenTexts(context.llm.tokenizer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        context = self._context
        route = read_fields(TOKENIZE, await read_object(scope, receive, context.settings.limits)).route
        check_model(context, route.get("model"))
        if ("prompt" in route) == ("messages" in route):
            raise RequestError("prompt and messages are both there, or neither; allowed: one of them", "prompt")
        for name, owner in (
            ("add_special_tokens", "prompt"),
            ("tools", "messages"),
            ("add_generation_prompt", "messages"),
            ("chat_template_kwargs", "messages"),
        ):
            if name in route and owner not in route:
                raise RequestError(f"{name} is given without {owner}; allowed: with {owner} only", name)
        async with Watch(receive, context.settings.limits.request_s):
            with context.admission.encoding(Exchange.of(scope).num_body_bytes):
                token_ids = await self._encode(route)
                body = await context.llm.on_text_thread(self._answer, token_ids, route.get("return_token_strs", False))
        await send_response(send, 200, body, "application/json")

    async def _encode(self, route: dict[str, Any]) -> list[int]:
        llm = self._context.llm
        if "prompt" in route:
            return await llm.encode(route["prompt"], add_bos=route.get("add_special_tokens", True))
        return await encode_messages(
            llm,
            route["messages"],
            tools=route.get("tools") or None,
            add_generation_prompt=route.get("add_generation_prompt", True),
            chat_template_kwargs=route.get("chat_template_kwargs"),
        )

    def _answer(self, token_ids: list[int], with_texts: bool) -> bytes:
        texts = [self._texts.text(token_id) for token_id in token_ids] if with_texts else None
        max_model_len = self._context.llm.info.max_model_len
        return msgspec.json.encode(
            {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": texts}
        )


class Detokenize:
    """The route from token ids to a text."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        context = self._context
        route = read_fields(DETOKENIZE, await read_object(scope, receive, context.settings.limits)).route
        check_model(context, route.get("model"))
        tokenizer, token_ids = context.llm.tokenizer, route["tokens"]
        if tokenizer is None:
            raise RequestError("the model has no tokenizer; allowed: nothing", "tokens")
        async with Watch(receive, context.settings.limits.request_s):
            with context.admission.encoding(Exchange.of(scope).num_body_bytes):
                body = await context.llm.on_text_thread(_decoded, tokenizer, token_ids)
        await send_response(send, 200, body, "application/json")


def _decoded(tokenizer: Tokenizer, token_ids: list[Any]) -> bytes:
    check_ids(token_ids, tokenizer.vocab_size, "tokens")
    return msgspec.json.encode({"prompt": tokenizer.decode(token_ids, skip_special_tokens=False)})
