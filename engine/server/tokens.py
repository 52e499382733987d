"""This module holds /tokenize and /detokenize. It does not know sampling."""

from __future__ import annotations

import asyncio

from ..errors import RequestError
from .body import read_object, send_json
from .context import Context, check_ids, check_model, encode_messages, encode_text
from .exchange import Receive, Scope, Send
from .fields import DETOKENIZE, TOKENIZE, read_fields
from .logprobs import TokenTexts

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
        if "prompt" in route:
            token_ids = await encode_text(
                context.llm, route["prompt"], add_special_tokens=route.get("add_special_tokens", True)
            )
        else:
            token_ids = await encode_messages(
                context.llm,
                route["messages"],
                tools=route.get("tools") or None,
                add_generation_prompt=route.get("add_generation_prompt", True),
                chat_template_kwargs=route.get("chat_template_kwargs"),
            )
        texts = [self._texts.text(token_id) for token_id in token_ids] if route.get("return_token_strs") else None
        max_model_len = context.llm.info.max_model_len
        await send_json(
            send,
            {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": texts},
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
        if not isinstance(token_ids, list):
            raise RequestError("tokens is no list; allowed: token ids", "tokens")
        check_ids(token_ids, tokenizer.vocab_size, "tokens")
        text = await asyncio.to_thread(tokenizer.decode, token_ids, skip_special_tokens=False)
        await send_json(send, {"prompt": text})
