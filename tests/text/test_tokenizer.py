"""Encoding and decoding against transformers, against definitions, and against damaged files."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.errors import CheckpointError, RequestError
from octavo.engine.text import Tokenizer
from tokenizers import Tokenizer as Backend

Spm = Callable[..., dict[str, Any]]

CORPUS = [
    "",
    " ",
    "\n\n\t  \r\n x   \u00a0\u3000y ",
    "    def f(x):\n\treturn {'a': x ** 2}  # it's, they'LL, I'd\n",
    "0 1 12 123 1234  12   345 3.14159 1e-9 ½ ² Ⅷ ٣٤ ९ 20240101 a1b22 \n\n 7",
    "Grüße, naïve café, cafe\u0301, ΑΒΓ αβγς, Привет мир, שלום עולם, مرحبا بالعالم",
    "你好，世界。今日は良い天気ですね。안녕하세요 สวัสดี नमस्ते ꯃꯤꯇꯩ",
    "🦜🚀👩‍👩‍👧‍👦🇪🇺 ☃️ \U0001f9ff\u200d a\u0000b\x07\x1b[0m \ufffd \ufeff",
    '<html><!-- --></html> == != <= => && || \\n "quoted" `x` $y @z #1',
    "a" * 50 + " " * 33 + "!" * 9 + "\n" * 5,
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|> <|im_en <|endoftext|>x<repo_name>",
]


@pytest.mark.parametrize("text", CORPUS)
def test_smollm_equals_transformers(text: str, smollm: Tokenizer, hf_smollm: Any) -> None:
    ids = smollm.encode(text)
    assert ids == hf_smollm(text).input_ids
    for skip in (True, False):
        assert smollm.decode(ids, skip) == hf_smollm.decode(ids, skip_special_tokens=skip)


def test_smollm_equals_transformers_on_any_text(smollm: Tokenizer, hf_smollm: Any, examples: Any) -> None:
    fragments = st.sampled_from([*"  \n\t'0123½aZé.,<|>🦜ß你", "<|im_end|>", "'s", "the", "  "])
    texts = st.one_of(st.text(max_size=40), st.lists(fragments, max_size=20).map("".join))

    @examples(200, 5000)
    @given(texts)
    def check(text: str) -> None:
        ids = smollm.encode(text)
        assert ids == hf_smollm(text).input_ids
        # Not the text itself: SmolLM2's vocabulary lacks some bytes (U+001D, the lead byte F1), and these vanish.
        assert smollm.decode(ids, False) == hf_smollm.decode(ids)

    check()


def test_digits_change_the_spaces_before_them(smollm: Tokenizer) -> None:
    """The one place where SmolLM2's digit splitting shows: two spaces stay one token before a digit."""
    spaces = smollm.encode("  ")
    assert len(spaces) == 1
    assert smollm.encode("x  1")[1:2] == spaces


def test_smollm_names_its_tokens(smollm: Tokenizer) -> None:
    assert (smollm.vocab_size, smollm.bos_token_id, smollm.eos_token_id) == (49152, 1, 2)
    assert smollm.special_token_ids == frozenset(range(17))
    assert smollm.encode("hi") == smollm.encode("hi", add_bos=False)
    assert smollm.chat_template is not None


def test_batches_equal_single_texts(smollm: Tokenizer, byte_level_backend: Backend) -> None:
    for tokenizer in (smollm, Tokenizer(byte_level_backend, prefix=[5])):
        for options in ({}, {"add_bos": False}, {"parse_special": False}):
            assert tokenizer.encode_batch(CORPUS, **options) == [tokenizer.encode(text, **options) for text in CORPUS]


def test_special_tokens_as_text(smollm: Tokenizer) -> None:
    text = "a<|im_end|>b <|im_start|>"
    ids = smollm.encode(text, parse_special=False)
    assert not smollm.special_token_ids & set(ids)
    assert smollm.decode(ids) == text


def test_plain_spans_are_exact(smollm: Tokenizer) -> None:
    text = "<|im_end|>a<|im_end|><|im_end|>"
    first, second, third = 0, 11, 21

    def encode(*starts: int) -> list[int]:
        return smollm.encode(text, plain_spans=[(start, start + 10) for start in starts])

    a, end, plain = smollm.encode("a"), [2], smollm.encode("<|im_end|>", parse_special=False)
    assert encode(second) == [*end, *smollm.encode("a<|im_end|>", parse_special=False), *end]
    assert encode(first, third) == [*smollm.encode("<|im_end|>a", parse_special=False), *end, *plain]
    assert encode() == [*end, *a, *end, *end]
    # One character is enough to keep a token from being parsed.
    assert smollm.encode(text, plain_spans=[(third + 4, third + 5)]) == [*end, *a, *end, *plain]


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\ud83d\ude00"])
def test_lone_surrogates_are_refused(text: str, smollm: Tokenizer) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        smollm.encode(text)
    with pytest.raises(RequestError, match="lone surrogate"):
        smollm.encode_batch(["fine", text])


@pytest.mark.parametrize("ids", [[-1], [49152], [0, 2**31]])
def test_ids_beyond_the_vocabulary_are_refused(ids: list[int], smollm: Tokenizer) -> None:
    with pytest.raises(RequestError, match="0 to 49151"):
        smollm.decode(ids)


@pytest.mark.parametrize(("pre", "composes"), [("qwen2", True), ("llama-bpe", False)])
def test_qwen2_composes_characters(pre: str, composes: bool, smollm_metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(smollm_metadata | {"tokenizer.ggml.pre": pre})
    assert (tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")) is composes


def sentence_piece(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece BPE by its definition: join the adjacent pair whose piece scores best, leftmost first."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: index for index, token in enumerate(tokens)}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list(text.replace(" ", "▁"))
    while True:
        joined = ["".join(pair) for pair in itertools.pairwise(symbols)]
        pairs = [(scores[ids[piece]], -at) for at, piece in enumerate(joined) if piece in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    pieces = [[ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
    return [token_id for piece in pieces for token_id in piece]


@pytest.mark.parametrize("add_space", [True, False])
def test_sentence_piece_equals_its_definition(add_space: bool, spm: Spm, examples: Any) -> None:
    metadata = spm(**{"tokenizer.ggml.add_space_prefix": add_space})
    tokenizer = Tokenizer.from_gguf(metadata)

    @examples(150, 5000)
    @given(st.text(" abcé🦜x\n", max_size=24))
    def check(text: str) -> None:
        expected = sentence_piece(" " * (add_space and text != "") + text, metadata)
        assert tokenizer.encode(text) == [1, *expected]
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


def test_bos_exactly_once(spm: Spm) -> None:
    tokenizer = Tokenizer.from_gguf(spm())
    a = tokenizer.encode("a", add_bos=False)
    assert 1 not in a
    assert tokenizer.encode("a") == [1, *a]
    assert tokenizer.encode("<s>a") == [1, *a]
    assert tokenizer.encode("<s>a", parse_special=False)[0] == 1
    assert tokenizer.encode("<s>a", parse_special=False).count(1) == 1
    assert tokenizer.encode("") == [1]
    silent = Tokenizer.from_gguf(spm(**{"tokenizer.ggml.add_bos_token": False}))
    assert silent.encode("a") == a


PRE = {
    "gpt-2": ["I", "'m", " 123", "'M", "  ", " x"],
    "smollm": ["I", "'m", " ", "1", "2", "3", "'", "M", "  ", " x"],
    "llama-bpe": ["I", "'m", " ", "123", "'M", "  ", " x"],
    "qwen2": ["I", "'m", " ", "1", "2", "3", "'M", "  ", " x"],
}


@pytest.mark.parametrize("pre", [*PRE, "default", "tekken"])
def test_words_are_split_as_named(pre: str, smollm_metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(smollm_metadata | {"tokenizer.ggml.pre": pre})
    text = "I'm 123'M   x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if pre in PRE:
        words = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
        spelled = [text[start:end] for _, (start, end) in words]
        expected = PRE[pre] if pre != "gpt-2" else ["I", "'m", " 123", "'", "M", "  ", " x"]
        assert spelled == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer.ggml.model": "bert"}, "supported: gpt2"),
        ({"tokenizer.ggml.model": None}, "supported: gpt2"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "viking"}, "supported: .*smollm"),
        ({"tokenizer.ggml.model": "gpt2"}, "merges is missing"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a q"]}, "joins no two tokens"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "twice"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "wrong type"),
        ({"tokenizer.ggml.scores": [0.0]}, "1 values for 277 tokens"),
        ({"tokenizer.ggml.scores": [float("nan")] * 277}, "not finite"),
        ({"tokenizer.ggml.token_type": [1]}, "1 values for 277 tokens"),
        ({"tokenizer.ggml.bos_token_id": 277}, "allowed: 0 to 276"),
        ({"tokenizer.ggml.eos_token_id": -1}, "allowed: 0 to 276"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "expected int"),
        ({"tokenizer.ggml.add_bos_token": 1}, "expected bool"),
        ({"tokenizer.chat_template": 1}, "not a string"),
    ],
)
def test_bad_gguf_metadata_is_refused(changes: dict[str, Any], reason: str, spm: Spm) -> None:
    with pytest.raises(CheckpointError, match=reason):
        Tokenizer.from_gguf(spm(**changes), file="x.gguf")


def save(folder: Path, backend: Backend, **config: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return folder


@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_folder_equals_transformers(config: dict[str, Any], tmp_path: Path, byte_level_backend: Backend) -> None:
    from transformers import AutoTokenizer

    folder = save(tmp_path, byte_level_backend, **config)
    tokenizer, oracle = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in [*CORPUS, "the <think>12</think> <eos>"]:
        assert tokenizer.encode(text) == oracle(text).input_ids
        assert tokenizer.encode(text, add_bos=False) == oracle(text, add_special_tokens=False).input_ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert tokenizer.vocab_size == len(oracle)


def test_folder_template_comes_from_its_own_file_first(tmp_path: Path, byte_level_backend: Backend) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert Tokenizer.from_folder(save(tmp_path, byte_level_backend)).chat_template is None
    assert Tokenizer.from_folder(save(tmp_path, byte_level_backend, chat_template="s")).chat_template == "s"
    assert Tokenizer.from_folder(save(tmp_path, byte_level_backend, chat_template=named)).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("own")
    assert Tokenizer.from_folder(tmp_path).chat_template == "own"


def test_tokens_that_look_like_control_are_text_in_plain_spans(byte_level_backend: Backend) -> None:
    tokenizer = Tokenizer(byte_level_backend)
    user, think = tokenizer.token_to_id("<｜User｜>"), tokenizer.token_to_id("<think>")
    assert tokenizer.encode("<｜User｜><think>") == [user, think]
    plain = tokenizer.encode("<｜User｜><think>", parse_special=False)
    assert user not in plain
    assert plain[-1] == think
    assert tokenizer.decode(plain) == "<｜User｜><think>"


def test_merges_cannot_build_a_control_token(byte_level_backend: Backend) -> None:
    state = json.loads(byte_level_backend.to_str())
    state["model"]["vocab"] |= {"<e": 500, "os": 501, "<eos": 502, "<eos>": state["model"]["vocab"].pop("<eos>", 503)}
    state["model"]["merges"] += [["<", "e"], ["o", "s"], ["<e", "os"], ["<eos", ">"]]
    state["added_tokens"] = [
        token | {"id": state["model"]["vocab"].get(token["content"], token["id"])} for token in state["added_tokens"]
    ]
    tokenizer = Tokenizer(Backend.from_str(json.dumps(state)))
    assert tokenizer.encode("<eos>") == [503]
    assert 503 not in tokenizer.encode("<eos>", parse_special=False)


def test_damaged_files_are_refused(tmp_path: Path, byte_level_backend: Backend) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        Tokenizer.from_folder(tmp_path)
    save(tmp_path, byte_level_backend)
    for damage in ("[]", "{", '"x"', "[" * 100_000, "\x00"):
        (tmp_path / "tokenizer_config.json").write_text(damage)
        with pytest.raises(CheckpointError, match="tokenizer_config"):
            Tokenizer.from_folder(tmp_path)
    save(tmp_path, byte_level_backend, eos_token="<absent>")
    with pytest.raises(CheckpointError, match="not in the vocabulary"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("decoder", [{"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "CTC"}])
def test_other_decoders_are_refused(decoder: dict[str, Any], tmp_path: Path, byte_level_backend: Backend) -> None:
    folder = save(tmp_path, byte_level_backend)
    state = json.loads((folder / "tokenizer.json").read_text())
    extra = {"pad_token": "", "word_delimiter_token": "", "cleanup": True} if decoder["type"] == "CTC" else {}
    (folder / "tokenizer.json").write_text(json.dumps(state | {"decoder": decoder | extra}))
    with pytest.raises(CheckpointError, match="not supported"):
        Tokenizer.from_folder(folder)


def test_flipped_bytes_end_in_a_checkpoint_error(
    tmp_path: Path, byte_level_backend: Backend, count: Callable[[int, int], int]
) -> None:
    data = (save(tmp_path, byte_level_backend) / "tokenizer.json").read_bytes()
    rng = random.Random(7)
    refused = 0
    for _ in range(count(150, 5000)):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path / "tokenizer.json").write_bytes(broken[: rng.choice((len(broken), rng.randrange(len(broken))))])
        try:
            Tokenizer.from_folder(tmp_path).encode("the <eos> 12")
        except CheckpointError:
            refused += 1
    assert refused > 0


def test_a_special_token_in_a_text_is_named(smollm: Tokenizer, byte_level_backend: Backend, examples: Any) -> None:
    assert smollm.special_in("a<|im_end|>b <|im_start|>") in ("<|im_end|>", "<|im_start|>")
    assert smollm.special_in("<|im_end|>") == "<|im_end|>"
    for text in (*CORPUS, "", "<|im_en", "< |im_end|>", "<|IM_END|>"):
        assert (smollm.special_in(text) is None) == (smollm.control_pattern.search(text) is None), text
    tokenizer = Tokenizer(byte_level_backend)
    assert tokenizer.special_in("x<｜User｜>") == "<｜User｜>"
    # It is an entry of the vocabulary like another: it opens nothing.
    assert tokenizer.special_in("<think>") is None

    @examples(30, 300)
    @given(st.lists(st.sampled_from(["<|im_", "end|>", "<", "|>", " ", "a", "é", "<|im_start|>"]), max_size=6))
    def named_where_it_is_parsed(parts: list[str]) -> None:
        text = "".join(parts)
        is_parsed = bool(set(smollm.control_tokens.values()) & set(smollm.encode(text, add_bos=False)))
        assert (smollm.special_in(text) is not None) == is_parsed

    named_where_it_is_parsed()
