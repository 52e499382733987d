"""This module holds the knobs of one request and the one table that says what each accepts. It does not know torch.

Python, the command line, JSONL and HTTP all go through `RULES`, so a value is taken or refused the same way everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from .config import GenerationConfig
from .errors import RequestError, describe
from .output_format import MAX_OUTPUT_FORMAT_BYTES, MAX_OUTPUT_FORMAT_DEPTH, check_output_format

__all__ = ["RULES", "Rule", "SamplingParams", "check_field"]

MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BAD_SEQUENCES = 1024
MAX_LISTED_IDS = 1 << 20
_INT32_MAX = 2**31 - 1

# Stands for "not given" where a checkpoint's generation_config may supply the default; never seen on a built object.
_UNSET: Any = object()


class _Refused(Exception):  # noqa: N818 (control flow between a parser and its caller, never seen outside)
    """A parser does not take the value."""


class Rule(NamedTuple):
    """What one field takes: its type and range in words, and the parser that returns the value to keep."""

    type: str
    allowed: str
    parse: Callable[[Any], Any]


def _refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise RequestError(f"{name} is {describe(value)}; allowed: {allowed}", param=name)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(low: float, high: float, *, above_low: bool = False) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        # Comparisons with NaN are false, so written this way round NaN is refused.
        if not (_is_int(value) or isinstance(value, float)) or not (low <= value <= high):
            raise _Refused
        if above_low and value == low:
            raise _Refused
        return float(value)

    return parse


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if not _is_int(value) or not (low <= value <= high):
            raise _Refused
        return int(value)

    return parse


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Refused
    return value


def _text(max_chars: int) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or not (1 <= len(value) <= max_chars):
            raise _Refused
        try:
            value.encode()  # a lone surrogate can neither be tokenised nor sent back
        except UnicodeEncodeError:
            raise _Refused from None
        return value

    return parse


def _optional(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else parse(value)


def _listed(parse: Callable[[Any], Any], low: int, high: int, *, lone: type | None = None) -> Callable[[Any], Any]:
    """Return a parser of low…high items, kept as a tuple; None is the empty list, a lone `lone` a list of one."""

    def parse_list(value: Any) -> tuple[Any, ...]:
        if value is None:
            value = ()
        elif lone is not None and isinstance(value, lone):
            value = (value,)
        if not isinstance(value, (list, tuple)) or not (low <= len(value) <= high):
            raise _Refused
        return tuple([parse(item) for item in value])

    return parse_list


def _top_k(value: Any) -> int:
    top_k = _integer(-1, _INT32_MAX)(value)
    return 0 if top_k == -1 else top_k


_token_id = _integer(0, _INT32_MAX)
_bias = _number(-100.0, 100.0)


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > MAX_BIASES:
        raise _Refused
    return {_token_id(token_id): _bias(bias) for token_id, bias in value.items()} or None


def _structured_outputs(value: Any) -> dict[str, Any] | None:
    try:
        return None if value is None else check_output_format(value)
    except ValueError:
        raise _Refused from None


RULES: dict[str, Rule] = {
    "n": Rule("int", "an integer from 1 to 128", _integer(1, 128)),
    "temperature": Rule("float", "a number from 0 to 2; 0 is greedy", _number(0.0, 2.0)),
    "top_p": Rule("float", "a number above 0 and at most 1", _number(0.0, 1.0, above_low=True)),
    "top_k": Rule("int", "an integer from 1 to the vocabulary's size; 0 or -1 is off", _top_k),
    "min_p": Rule("float", "a number from 0 to 1", _number(0.0, 1.0)),
    "presence_penalty": Rule("float", "a number from -2 to 2", _number(-2.0, 2.0)),
    "frequency_penalty": Rule("float", "a number from -2 to 2", _number(-2.0, 2.0)),
    "repetition_penalty": Rule("float", "a number above 0 and at most 10", _number(0.0, 10.0, above_low=True)),
    "seed": Rule("int", "an integer from 0 to 2**63 - 1", _optional(_integer(0, 2**63 - 1))),
    "stop": Rule("list[str]", "at most 16 strings of 1 to 256 characters", _listed(_text(256), 0, 16, lone=str)),
    "stop_token_ids": Rule("list[int]", "at most 256 token ids", _listed(_token_id, 0, 256)),
    "include_stop_str_in_output": Rule("bool", "true or false", _flag),
    "ignore_eos": Rule("bool", "true or false", _flag),
    "max_tokens": Rule("int", "an integer from 1 to the context left", _optional(_integer(1, _INT32_MAX))),
    "min_tokens": Rule("int", "an integer from 0 to max_tokens", _integer(0, _INT32_MAX)),
    "logprobs": Rule("int", f"an integer from 0 to {MAX_LOGPROBS}", _optional(_integer(0, MAX_LOGPROBS))),
    "prompt_logprobs": Rule("int", f"an integer from 0 to {MAX_LOGPROBS}", _optional(_integer(0, MAX_LOGPROBS))),
    "logit_bias": Rule(
        "dict[int, float]", f"at most {MAX_BIASES} token ids, each with a number from -100 to 100", _logit_bias
    ),
    "allowed_token_ids": Rule(
        "list[int]", f"1 to {MAX_LISTED_IDS} token ids", _optional(_listed(_token_id, 1, MAX_LISTED_IDS))
    ),
    "bad_words": Rule("list[str]", "at most 256 strings of 1 to 256 characters", _listed(_text(256), 0, 256)),
    "bad_words_token_ids": Rule(
        "list[list[int]]",
        f"at most {MAX_BAD_SEQUENCES} lists of 1 to 256 token ids",
        _listed(_listed(_token_id, 1, 256), 0, MAX_BAD_SEQUENCES),
    ),
    "skip_special_tokens": Rule("bool", "true or false", _flag),
    "detokenize": Rule("bool", "true or false", _flag),
    "return_hidden_states": Rule(
        "list[int]", "1 to 256 layer indices, from 0", _optional(_listed(_integer(0, 65535), 1, 256))
    ),
    "structured_outputs": Rule(
        "dict[str, Any]",
        "one of json (a schema), json_object (true), regex, choice (1 to 1024 strings) and grammar (Lark), at most "
        f"{MAX_OUTPUT_FORMAT_BYTES // 1024} KB and {MAX_OUTPUT_FORMAT_DEPTH} deep",
        _structured_outputs,
    ),
    "priority": Rule("int", "an integer from -2**31 to 2**31 - 1; lower runs first", _integer(-(2**31), _INT32_MAX)),
    "cache_salt": Rule("str", "a string of 1 to 256 characters", _optional(_text(256))),
}

_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def check_field(name: str, value: Any) -> Any:
    """Return the value to keep for one field.

    Args:
        name: a key of `RULES`.
        value: anything at all.

    Raises:
        RequestError: the value is not allowed; `param` is the field's name.
    """
    rule = RULES[name]
    try:
        return rule.parse(value)
    except _Refused:
        _refuse(name, value, rule.allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request wants its tokens chosen, stopped and reported. Building one checks all that needs no model.

    Lists are kept as tuples, `stop` may be one string, and `top_k=-1` is kept as 0. Where temperature, top_p, top_k,
    min_p or repetition_penalty is not given, the checkpoint's generation_config decides (`with_defaults`), and where
    that says nothing it is 1.0, 1.0, 0, 0.0 and 1.0.

    Raises:
        RequestError: a field's value is not allowed; names the field, the value and what is.
    """

    n: int = 1
    """Sequences to generate for one prompt; each has noise of its own."""
    temperature: float = _UNSET
    """Logits are divided by it; 0 takes the most probable token."""
    top_p: float = _UNSET
    """Keep the fewest most probable tokens whose mass, among those min_p and top_k left, reaches it."""
    top_k: int = _UNSET
    """Keep that many most probable tokens; 0: all."""
    min_p: float = _UNSET
    """Drop tokens less probable than this part of the most probable one."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token generated so far."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a generated token once for each time it was."""
    repetition_penalty: float = _UNSET
    """Divides positive and multiplies negative logits of tokens in the prompt or the output."""
    seed: int | None = None
    """Same seed, same tokens; None: drawn by the engine."""
    stop: Sequence[str] = ()
    """Strings that end the output."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the output, besides EOS."""
    include_stop_str_in_output: bool = False
    """Keep the stop string or token that ended the output in the text."""
    ignore_eos: bool = False
    """Go on after EOS; it may still be sampled."""
    max_tokens: int | None = None
    """Most tokens to generate; None: the caller's default (16, or the context left in a chat)."""
    min_tokens: int = 0
    """EOS and stop_token_ids are not sampled before that many tokens, and no stop string ends with one of them."""
    logprobs: int | None = None
    """Report the sampled token's log-probability and those of that many top tokens; None: neither."""
    prompt_logprobs: int | None = None
    """The same for every token of the prompt but the first."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of the token ids named."""
    allowed_token_ids: Sequence[int] | None = None
    """Sample nothing else; None: anything."""
    bad_words: Sequence[str] = ()
    """Words never to generate, alone or after a space."""
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    """Sequences of token ids never to complete."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    detokenize: bool = True
    """Turn token ids into text."""
    return_hidden_states: Sequence[int] | None = None
    """Layers whose hidden states to return; None: none."""
    structured_outputs: Mapping[str, Any] | None = None
    """What the output must look like; None: anything. It ends where nothing can follow, whatever min_tokens."""
    priority: int = 0
    """Lower runs first, where the scheduler's policy is priority."""
    cache_salt: str | None = None
    """Requests share prefix-cache blocks only with others of the same salt."""
    given: frozenset[str] = field(init=False, repr=False, compare=False)
    """Those fields a generation_config may fill that the caller gave."""

    def __post_init__(self) -> None:
        keep = object.__setattr__
        keep(self, "given", frozenset(name for name in _DEFAULTS if getattr(self, name) is not _UNSET))
        for name in RULES:
            value = getattr(self, name)
            parsed = _DEFAULTS[name] if value is _UNSET else check_field(name, value)
            if parsed is not value:
                keep(self, name, parsed)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", self.min_tokens, f"an integer from 0 to max_tokens, {self.max_tokens}")
        if self.stop and not self.detokenize:
            _refuse("stop", self.stop, "none while detokenize is false: stop strings are found in the text")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], defaults: GenerationConfig | None = None) -> SamplingParams:
        """Build from parsed JSON: null means the default, and the keys of logit_bias are decimal strings.

        Args:
            mapping: field name -> value.
            defaults: what the checkpoint says of sampling, for the fields left out.

        Raises:
            RequestError: a key is unknown or a value not allowed; `param` is the key.
        """
        for key in mapping:
            if key not in RULES:
                allowed = ", ".join(RULES)
                name = str(key)[:64].encode(errors="backslashreplace").decode()
                raise RequestError(f"unknown parameter {describe(key)}; allowed: {allowed}", param=name)
        values = {key: value for key, value in mapping.items() if value is not None}
        if isinstance(bias := values.get("logit_bias"), Mapping):
            if len(bias) > MAX_BIASES:
                _refuse("logit_bias", bias, RULES["logit_bias"].allowed)
            values["logit_bias"] = {_id_from_key(key): number for key, number in bias.items()}
        return cls(**values).with_defaults(defaults)

    def replace(self, **changes: Any) -> SamplingParams:
        """Return a copy with some fields changed; the changed ones count as given, the others as before."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        changed = SamplingParams(**{**kept, **changes})
        # What a generation_config has filled in stays, and stays filled in.
        object.__setattr__(changed, "given", self.given | (changes.keys() & _DEFAULTS.keys()))
        return changed

    def with_defaults(self, defaults: GenerationConfig | None) -> SamplingParams:
        """Return a copy in which fields the caller did not give have the checkpoint's defaults, where it has any."""
        if defaults is None:
            return self
        found = {name: getattr(defaults, name) for name in _DEFAULTS if name not in self.given}
        changes = {name: value for name, value in found.items() if value is not None}
        if not changes:
            return self
        filled = self.replace(**changes)
        object.__setattr__(filled, "given", self.given)
        return filled

    def with_bad_words(self, encode: Callable[[str], Sequence[int]]) -> SamplingParams:
        """Return a copy whose `bad_words` are banned as token ids, alone and after a space.

        Args:
            encode: text -> token ids, with no BOS added and special tokens not parsed.
        """
        if not self.bad_words:
            return self
        sequences = dict.fromkeys(tuple(ids) for ids in self.bad_words_token_ids)
        for word in self.bad_words:
            for text in (word, " " + word):
                if ids := tuple(encode(text)):
                    sequences[ids] = None
        return self.replace(bad_words=(), bad_words_token_ids=tuple(sequences))

    def validate_for(
        self,
        *,
        vocab_size: int,
        max_model_len: int,
        prompt_len: int,
        default_max_tokens: int | None = None,
        max_output_tokens: int | None = None,
        num_layers: int | None = None,
    ) -> int:
        """Check what depends on the model and the prompt.

        Args:
            vocab_size: width of the logits; every token id must be below it.
            max_model_len: longest prompt plus output, tokens.
            prompt_len: tokens of the prompt.
            default_max_tokens: for `max_tokens=None`; None: the context left.
            max_output_tokens: most tokens of all n sequences together; None: no limit.
            num_layers: layers whose hidden states there are; None: not checked.

        Returns:
            The effective max_tokens.
        """
        left = max_model_len - prompt_len
        if prompt_len < 1 or left < 1:
            allowed = f"1 to {max_model_len - 1} (the context is {max_model_len})"
            raise RequestError(f"the prompt has {prompt_len} tokens; allowed: {allowed}", param="prompt")
        max_tokens = min(left, default_max_tokens or left) if self.max_tokens is None else self.max_tokens
        if max_tokens > left:
            _refuse("max_tokens", max_tokens, f"1 to {left} ({max_model_len} less a prompt of {prompt_len} tokens)")
        if self.min_tokens > max_tokens:
            _refuse("min_tokens", self.min_tokens, f"an integer from 0 to max_tokens, {max_tokens}")
        if max_output_tokens is not None and self.n * max_tokens > max_output_tokens:
            _refuse("n", self.n, f"n times max_tokens ({max_tokens}) at most {max_output_tokens}")
        if "top_k" in self.given and self.top_k > vocab_size:
            _refuse("top_k", self.top_k, f"an integer from 1 to {vocab_size}; 0 or -1 is off")
        self._check_token_ids(vocab_size)
        if num_layers is not None and self.return_hidden_states is not None:
            for layer in self.return_hidden_states:
                if layer >= num_layers:
                    _refuse("return_hidden_states", layer, f"layer indices from 0 to {num_layers - 1}")
        return max_tokens

    def _check_token_ids(self, vocab_size: int) -> None:
        named: tuple[tuple[str, Iterable[int]], ...] = (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", self.logit_bias or ()),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("bad_words_token_ids", (token_id for ids in self.bad_words_token_ids for token_id in ids)),
        )
        for name, token_ids in named:
            largest = max(token_ids, default=0)
            if largest >= vocab_size:
                _refuse(name, largest, f"token ids from 0 to {vocab_size - 1}")


def _id_from_key(key: Any) -> int:
    if _is_int(key):
        return int(key)
    # str(int(key)) == key refuses "+5", "05" and " 5", which would let two keys name one token.
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key:
        return int(key)
    _refuse("logit_bias", key, "token ids as decimal strings for keys")
