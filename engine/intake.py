"""This module holds the way of a request into an engine: what a user gives becomes token ids and parameters in which
nothing can be wrong. It does not know the engine, HTTP or how answers come back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from .config import GenerationConfig
from .errors import ConfigError, RequestError, describe
from .sampling_params import SamplingParams
from .text import ChatTemplate, Tokenizer

__all__ = ["DEFAULT_MAX_TOKENS", "Intake", "Prompt", "check_ids", "is_list"]

Prompt = str | Sequence[int]
"""A text, or its token ids."""

DEFAULT_MAX_TOKENS = 16
"""Of a completion, where a request gives none; a chat takes the context that is left."""


class Intake:
    """Checks and completes what users ask of one model.

    Args:
        tokenizer: the model's; None takes token ids only.
        vocab_size: width of the logits.
        max_model_len: longest prompt plus output, tokens.
        num_layers: of the model.
        defaults: the checkpoint's sampling defaults; None: they do not count.
        chat_template: Jinja source to use in place of the tokenizer's.
        special_in_prompts: take the text of a special token in a prompt as that token; else refuse it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        num_layers: int,
        defaults: GenerationConfig | None,
        chat_template: str | None = None,
        special_in_prompts: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._num_layers = num_layers
        self._defaults = defaults
        self._template_source = chat_template
        self._special_in_prompts = special_in_prompts

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ConfigError: the model came without one.
        """
        if self._tokenizer is None:
            raise ConfigError("the model has no tokenizer; give token ids, or a folder with --tokenizer")
        return self._tokenizer

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template.

        Raises:
            ConfigError, CheckpointError: there is no tokenizer, or no template that compiles.
        """
        return ChatTemplate(self.tokenizer, self._template_source)

    def with_defaults(self, params: SamplingParams) -> SamplingParams:
        """Fill in the checkpoint's defaults."""
        return params.with_defaults(self._defaults)

    def with_bad_words(self, params: SamplingParams) -> SamplingParams:
        """Fill in the token ids of `bad_words`.

        Raises:
            ConfigError: there are such words and no tokenizer.
        """
        if not params.bad_words:
            return params
        return params.with_bad_words(lambda word: self.tokenizer.encode(word, add_bos=False, parse_special=False))

    def resolved(self, params: SamplingParams, prompt_len: int, default_max_tokens: int | None) -> SamplingParams:
        """Return the parameters with a number for `max_tokens`, checked against the model.

        Args:
            params: as `with_defaults` returns them.
            prompt_len: tokens of the prompt.
            default_max_tokens: for `max_tokens=None`; None: the context left.

        Raises:
            RequestError: the request could never run.
        """
        if params.stop and self._tokenizer is None:
            raise RequestError("stop is given and the model has no tokenizer; allowed: stop_token_ids", "stop")
        max_tokens = params.validate_for(
            vocab_size=self._vocab_size,
            max_model_len=self._max_model_len,
            prompt_len=prompt_len,
            default_max_tokens=default_max_tokens,
            num_layers=self._num_layers + 1,
        )
        return params if params.max_tokens is not None else params.replace(max_tokens=max_tokens)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the token ids of a conversation.

        Args:
            messages: as `ChatTemplate.render` takes them.
            options: of `ChatTemplate.render`.

        Raises:
            RequestError: the messages are not valid, the template refuses them, or they cannot fit the context.
        """
        prompt = self.chat_template.render(messages, **options)
        self._check_length(prompt.text, "messages")
        return self.tokenizer.encode(prompt.text, add_bos=False, plain_spans=prompt.plain_spans)

    def _check_length(self, text: str, param: str) -> None:
        """Refuse a text with more characters than the context's tokens can stand for, before it is tokenised."""
        allowed = self._max_model_len * self.tokenizer.longest_token
        if len(text) > allowed:
            raise RequestError(
                f"the prompt has {len(text)} characters; allowed: {allowed}, as more cannot fit the context of "
                f"{self._max_model_len} tokens",
                param,
            )

    def encode(self, prompt: Prompt, *, add_bos: bool = True) -> list[int]:
        """Return the token ids of a prompt: of a text (with BOS, if `add_bos`), or what `checked_ids` says of a list.

        Raises:
            RequestError: it is no valid text, holds a special token where that is refused, or something else than token
                ids.
        """
        if isinstance(prompt, str):
            self._check_length(prompt, "prompt")
            if not self._special_in_prompts and (token := self.tokenizer.special_in(prompt)) is not None:
                allowed = "a text without such, as this engine runs with --no-special-in-prompts"
                raise RequestError(f"prompt holds the special token {describe(token)}; allowed: {allowed}", "prompt")
            return self.tokenizer.encode(prompt, add_bos=add_bos)
        if not is_list(prompt):
            raise RequestError(f"prompt is {describe(prompt)}; allowed: a text, or a list of token ids", "prompt")
        return self.checked_ids(prompt)

    def checked_ids(self, prompt: Sequence[int]) -> list[int]:
        """Return the token ids of a prompt, checked against the vocabulary.

        Raises:
            RequestError: it is no list, or holds something else.
        """
        if not is_list(prompt):
            raise RequestError(f"prompt is {describe(prompt)}; allowed: a list of token ids", "prompt")
        token_ids = list(prompt)
        check_ids(token_ids, self._vocab_size, "prompt_token_ids")
        return token_ids


def check_ids(token_ids: Sequence[Any], vocab_size: int, param: str) -> None:
    """Check token ids against a vocabulary.

    Raises:
        RequestError: something is no id of it.
    """
    # Many are looked at in three passes of C, not id by id; only where one is refused it is searched for.
    if set(map(type, token_ids)) <= {int} and (not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size)):
        return
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            allowed = f"integers from 0 to {vocab_size - 1}"
            raise RequestError(f"{param} holds {describe(token_id)}; allowed: {allowed}", param)


def is_list(value: object) -> bool:
    """Whether it is a list in a caller's eyes: a text or bytes are sequences, too, of characters and numbers."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))
