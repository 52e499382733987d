"""This module holds the step from what a request asks of its output to a grammar. It does not know sequences.

The grammars are llguidance's (https://github.com/guidance-ai/llguidance): a lexer by derivatives under an Earley
parser. It is given one token more than the model has, which stands for the end of the output: which of the model's
tokens may end an output is a matter of the request, not of the grammar.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np

from ..errors import RequestError
from ..json_schema import json_rule, unknown_keyword
from .grammar import CompiledGrammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer

__all__ = ["GrammarCompiler", "Vocabulary"]

MAX_COMPILE_S = 10.0
"""Nothing measured takes longer than 0.6 s, by the limits below: this is for what was not thought of."""
MAX_CACHED = 16
MAX_LEXER_STATES = 50_000
"""Of up to 2 kB each."""

# Forced text would be cut into the tokenizer's own tokens, without a limit of fuel: a pattern like a{100000000} took
# 0.9 s in one step. Without it no step was seen to take more than 10 ms.
_OPTIONS = '%llguidance {"no_forcing": true}'

_LISTINGS = re.compile(r"; following special|\n +\d+ \||\n<non-verbose/>")
_NOT_HONOURED = re.compile(r"^\s*[\w!?-]+\[[^\]\n]*\b(temperature|stop)\s*=", re.MULTILINE)


class Vocabulary(Protocol):
    """What a grammar must know of a tokenizer."""

    vocab_size: int
    special_token_ids: frozenset[int]
    control_tokens: dict[str, int]

    def token_bytes(self) -> Sequence[bytes]:
        """Return what each id stands for in the text, b"" where nothing."""
        ...


class _TokenTable:
    """The tokens in the shape in which llguidance asks for them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        known = list(vocabulary.token_bytes())
        self.tokens = [*known, *[b""] * (vocab_size - len(known)), b"end of output"]
        self.eos_token_id = vocab_size
        # A special token is never text: a schema that allows any string does not allow the end of a turn in it.
        control = vocabulary.special_token_ids | frozenset(vocabulary.control_tokens.values())
        self.special_token_ids = [*sorted(control), vocab_size]

    def __call__(self, text: str) -> list[int]:
        return []  # asked for forced text only, of which there is none


class GrammarCompiler:
    """Compiles `SamplingParams.structured_outputs` for one model; any thread may ask.

    Args:
        vocabulary: the model's tokenizer.
        vocab_size: width of the logits.
        max_compile_s: after so many seconds a request is refused.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, *, max_compile_s: float = MAX_COMPILE_S) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._max_compile_s = max_compile_s
        self._lock = Lock()
        self._cache: OrderedDict[str, CompiledGrammar] = OrderedDict()

    def __call__(self, wanted: Mapping[str, Any]) -> CompiledGrammar:
        """Compile what one request wants, or find it compiled.

        Args:
            wanted: as `SamplingParams` keeps it.

        Raises:
            RequestError: it means nothing, asks for what does not exist, or takes too long.
        """
        name = json.dumps(wanted)
        with self._lock:
            if name in self._cache:
                self._cache.move_to_end(name)
                return self._cache[name]
        # The work itself cannot be interrupted. Its fuel is limited, so a thread left behind ends by itself.
        future = self._pool.submit(self._compile, _to_lark(wanted))
        try:
            grammar = future.result(self._max_compile_s)
        except TimeoutError:
            _refuse(f"does not compile within {self._max_compile_s:g} s")
        with self._lock:
            self._cache[name] = grammar
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar

    def _compile(self, lark: str) -> CompiledGrammar:
        from llguidance import LLMatcher
        from llguidance._lib import LLParserLimits

        with self._lock:
            tokenizer = self._tokenizer
        # Errors are not to quote the output. Fuel is limited by llguidance's own defaults.
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(tokenizer, lark, log_level=0, limits=limits)
        if matcher.is_error():
            _refuse(f"does not compile: {_first_words(matcher.get_error())}")
        grammar = CompiledGrammar(matcher, self._vocab_size)
        # The first mask is the dearest, and tells whether the grammar allows anything at all.
        bitmask = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
        state = grammar.start([])
        state.fill(bitmask)
        if not bitmask.any():
            reason = f" ({_first_words(state.error)})" if state.error else ""
            _refuse(f"allows no output at all{reason}")
        return grammar

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(2, "grammar")

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """The tokens as llguidance keeps them: a trie, 0.1 s for 50,000 tokens, so only where it is used."""
        from llguidance import LLTokenizer

        table: Any = _TokenTable(self._vocabulary, self._vocab_size)
        return LLTokenizer(table)


def _refuse(reason: str) -> NoReturn:
    raise RequestError(f"structured_outputs {reason}", param="structured_outputs")


def _first_words(error: str) -> str:
    """Return an error on one line, without the grammar and the list of all special tokens that some of them bring."""
    return " ".join(_LISTINGS.split(error, maxsplit=1)[0].split())[:300]


def _to_lark(wanted: Mapping[str, Any]) -> str:
    try:
        from llguidance import regex_to_lark
    except ImportError:
        _refuse("needs the package llguidance; it comes with: pip install 'octavo[serve]'")
    ((kind, value),) = wanted.items()
    if kind == "grammar":
        if found := _NOT_HONOURED.search(value):
            _refuse(f"has a rule with {found[1]!r}, which is not honoured; leave it out")
        return f"{value}\n{_OPTIONS}\n"
    if kind == "regex":
        rule = f"/{regex_to_lark(_without_anchors(value), 'd')}/"  # \\d is 0-9, as everybody expects
    elif kind == "choice":
        rule = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
    else:
        schema = value if kind == "json" else {"type": "object"}
        if keyword := unknown_keyword(schema):
            _refuse(f"has a schema with {keyword[:200]!a}, which is not supported; leave it out")
        rule = json_rule(schema)
    return f"{_OPTIONS}\nstart: {rule}\n"


def _without_anchors(regex: str) -> str:
    """Drop ^ and $ around the whole: the output is matched as a whole anyway, and inside they are not supported."""
    if regex.endswith("$") and (len(regex) - len(regex[:-1].rstrip("\\"))) % 2 == 1:
        regex = regex[:-1]
    return regex.removeprefix("^")
