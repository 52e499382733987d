"""What compiles and what is refused, and that masks say neither too much nor too little."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.errors import RequestError
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import GrammarState
from octavo.engine.structured import GrammarCompiler
from octavo.engine.text import Tokenizer

from ..checkpoints import VOCAB_SIZE
from ..text.conftest import spm_metadata
from .conftest import MakeLLM


def allowed(state: GrammarState, vocab_size: int = VOCAB_SIZE) -> set[int]:
    mask = np.full(-(-vocab_size // 32), -1, dtype=np.int32)
    state.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any()
    return set(bits.nonzero()[0].tolist())


@given(data=st.data())
def test_masks_are_exact(data: st.DataObject, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """A token may come next if and only if some choice goes on with it, at every step of a random walk."""
    words = st.lists(st.sampled_from([*"thinaé", "<eos>"]), min_size=1, max_size=5).map("".join)
    texts = data.draw(st.lists(words, min_size=1, max_size=5, unique=True))
    choices = [text.encode() for text in texts]
    pieces = tokenizer.token_bytes()
    special = tokenizer.special_token_ids
    grammar = compiler({"choice": texts})
    state, so_far, token_ids = grammar.start([]), b"", []
    while True:
        expected = {
            token_id
            for token_id, piece in enumerate(pieces)
            if piece and token_id not in special and any(choice.startswith(so_far + piece) for choice in choices)
        }
        for each in (state, grammar.start(token_ids)):
            assert allowed(each) == expected
            assert each.may_end == (so_far in choices)
            assert each.must_end == (so_far in choices and not expected)
            assert each.error == ""
        if not expected:
            break
        token_ids.append(data.draw(st.sampled_from(sorted(expected))))
        so_far += pieces[token_ids[-1]]
        state.accept(token_ids[-1])


@pytest.mark.parametrize("vocab_size", [261, 287, 288, 289, 320])
def test_masks_fit_every_width_of_logits(vocab_size: int, tokenizer: Tokenizer) -> None:
    state = GrammarCompiler(tokenizer, vocab_size)({"regex": "[ab]*"}).start([])
    assert allowed(state, vocab_size) == {64, 65}
    assert state.may_end


def test_tokens_of_sentence_piece_are_known() -> None:
    tokenizer = Tokenizer.from_gguf(spm_metadata())
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    state = compiler({"regex": "ab? é"}).start([])
    names = [tokenizer.token_to_id(name) for name in ("a", "ab", "<0x61>")]
    assert allowed(state, tokenizer.vocab_size) == set(names)
    state.accept(names[1])
    spaces = [tokenizer.token_to_id(name) for name in ("▁", "▁é", "<0x20>")]
    assert allowed(state, tokenizer.vocab_size) == set(spaces)


def test_a_token_that_was_not_allowed_is_an_error_and_no_crash(compiler: GrammarCompiler) -> None:
    state = compiler({"regex": "ab"}).start([66])
    assert state.error
    assert not state.may_end
    assert not state.must_end
    assert allowed(state) == set()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"json": {"type": "objekt"}}, "objekt"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "minimum"),
        ({"json": {"not": {"type": "string"}}}, "'not'"),
        ({"json": {"if": {}, "then": {}}}, "'if'"),
        ({"json": {"properties": {"a": {"items": [{"uniqueItems": True}]}}}}, "'properties.a.items[0].uniqueItems'"),
        ({"json": {"$defs": {"d": {"requried": []}}}}, "'$defs.d.requried'"),
        ({"json": {"x-guidance": {"lenient": True}}}, "'x-guidance'"),
        ({"json": {"$ref": "http://127.0.0.1/schema"}}, "127.0.0.1"),
        ({"json": {"$ref": "#"}}, "no output"),
        ({"json": {"format": "shoe-size", "type": "string"}}, "shoe-size"),
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "(a)\\1"}, "backreferences"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": "(?:" * 500 + "a" + ")" * 500}, ""),
        ({"regex": "$"}, "no output"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "start: start"}, "no output"),
        ({"grammar": "start: <|nosuch|>"}, "nosuch"),
        ({"grammar": "hello"}, ""),
        ({"grammar": "start: word\nword[temperature=0.1]: /a/"}, "temperature"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(wanted: dict[str, Any], words: str, llm: LLM) -> None:
    with pytest.raises(RequestError) as caught:
        llm.add([5], SamplingParams(structured_outputs=wanted))
    assert caught.value.param == "structured_outputs"
    message = str(caught.value)
    assert message.startswith("structured_outputs ")
    assert words in message
    assert len(message) < 400
    assert "\n" not in message
    assert not llm.engine.core.has_unfinished


MANY_PROPERTIES = {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}}
BOMBS: list[dict[str, Any]] = [
    {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    {"regex": "(((((a{0,9}){0,9}){0,9}){0,9}){0,9}){0,9}b"},
    {"regex": "a{100000000}"},
    {"regex": "(x+x+)+y"},
    {"regex": "(.*a){50}"},
    {"regex": "(a|b)*a(a|b){60}"},
    {"regex": "a*" * 5000},
    {"regex": "(\\d+)*(\\w+)*(\\s+)*" * 200},
    {"regex": "\\p{L}{500}\\w{500}"},
    {"json": {"type": "string", "pattern": "^((a{1,999}){1,999}){1,999}$"}},
    {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    MANY_PROPERTIES,
    {"grammar": 'start: x\nx: x x | "a"'},
    {"grammar": 'start: a{1,1000000}\na: "x" | "x" a'},
]


@pytest.mark.parametrize("wanted", BOMBS, ids=lambda wanted: str(wanted)[:40])
def test_a_bomb_is_refused_or_harmless(wanted: dict[str, Any], compiler: GrammarCompiler) -> None:
    """Fuel runs out in well under a second; the bound is for machines under load."""
    start = time.process_time()
    try:
        state = compiler(wanted).start([])
        for _ in range(20):
            token_ids = allowed(state)
            if not token_ids:
                break
            state.accept(min(token_ids))
    except RequestError as error:
        assert error.param == "structured_outputs"  # noqa: PT017 (either is right)
    assert time.process_time() - start < 10


def test_compiling_takes_no_longer_than_allowed(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="within 1e-09 s"):
        GrammarCompiler(tokenizer, VOCAB_SIZE, max_compile_s=1e-9)(MANY_PROPERTIES)


def test_grammars_are_compiled_by_any_thread_and_found_again(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(compiler, [{"regex": f"a{{{number % 20 + 1}}}b"} for number in range(60)]))
    for number, grammar in enumerate(found):
        state = grammar.start([64] * (number % 20 + 1))
        assert allowed(state) == {65}
    assert compiler({"regex": "a{20}b"}) is compiler({"regex": "a{20}b"})


def test_a_model_without_a_tokenizer_refuses(tiny_folder: Any, make_llm: MakeLLM, tmp_path: Any) -> None:
    for file in tiny_folder.iterdir():
        if file.name != "tokenizer.json":
            shutil.copy(file, tmp_path)
    with pytest.raises(RequestError, match="no tokenizer") as caught:
        LLM(str(tmp_path), device="cpu", kv_cache_tokens=64).add([5], SamplingParams(structured_outputs={"regex": "a"}))
    assert caught.value.param == "structured_outputs"
