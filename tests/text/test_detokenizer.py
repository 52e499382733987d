"""Streamed text equals the text of all ids, for every sequence of ids and every way of decoding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.text import Detokenizer, Tokenizer

KINDS = (
    *("smollm", "byte-level", "sentencepiece", "sentencepiece-bare", "metaspace", "metaspace-never"),
    *("no-fuse", "strip", "none"),
)


def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Any ids, with those of bytes over 127, fallback bytes and special tokens made likely."""
    rare = [
        token_id
        for token_id in range(min(tokenizer.vocab_size, 300))
        if "\ufffd" in tokenizer.decode([token_id], False) or token_id in tokenizer.special_token_ids
    ]
    some = st.integers(0, tokenizer.vocab_size - 1)
    return st.lists(st.one_of(some, st.sampled_from(rare)) if rare else some, max_size=14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_join_to_the_whole(
    kind: str, skip: bool, decoding_tokenizers: dict[str, Tokenizer], examples: Any
) -> None:
    tokenizer = decoding_tokenizers[kind]

    @examples(80, 3000)
    @given(id_lists(tokenizer), st.data())
    def check(ids: list[int], data: st.DataObject) -> None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=20)))
        bounds = [0, *cuts, len(ids)]
        stream = Detokenizer(tokenizer, skip)
        pieces = [stream.append(ids[start:end]) for start, end in itertools.pairwise(bounds)]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip)

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_text_continues_the_prompt(
    kind: str, skip: bool, decoding_tokenizers: dict[str, Tokenizer], examples: Any
) -> None:
    tokenizer = decoding_tokenizers[kind]

    @examples(80, 3000)
    @given(id_lists(tokenizer), id_lists(tokenizer))
    def check(prompt: list[int], ids: list[int]) -> None:
        whole = Detokenizer(tokenizer, skip)
        resumed = Detokenizer(tokenizer, skip, prompt)
        whole.append(prompt)
        expected = [whole.append([token_id]) for token_id in ids] + [whole.finish()]
        assert [resumed.append([token_id]) for token_id in ids] + [resumed.finish()] == expected

    check()


def test_a_character_is_given_out_with_its_last_byte(smollm: Tokenizer) -> None:
    ids = smollm.encode("🦜", add_bos=False)
    assert len(ids) > 1
    stream = Detokenizer(smollm)
    assert [stream.append([token_id]) for token_id in ids] == [""] * (len(ids) - 1) + ["🦜"]
    assert stream.finish() == ""


def test_an_unfinished_character_ends_as_a_replacement_character(smollm: Tokenizer) -> None:
    ids = smollm.encode("ok 🦜", add_bos=False)[:-1]
    stream = Detokenizer(smollm)
    assert stream.append(ids) == "ok "
    assert stream.finish() == "\ufffd"


def test_text_that_is_a_replacement_character_is_not_held_back(smollm: Tokenizer) -> None:
    stream = Detokenizer(smollm)
    assert stream.append(smollm.encode("\ufffd", add_bos=False)) == "\ufffd"


def test_bytes_that_can_never_be_valid_are_not_held_back(decoding_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = decoding_tokenizers["sentencepiece"]
    bad = tokenizer.token_to_id("<0xFF>")
    assert bad is not None
    stream = Detokenizer(tokenizer)
    assert [stream.append([bad]) for _ in range(3)] == ["\ufffd"] * 3


def test_ids_beyond_the_vocabulary_have_no_text(smollm: Tokenizer) -> None:
    stream = Detokenizer(smollm)
    assert stream.append([smollm.vocab_size, 2**31, *smollm.encode("ok")]) == "ok"
    assert len(smollm.pieces(True).keys() - set(range(smollm.vocab_size))) == 0
