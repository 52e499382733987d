"""This module holds verify on SmolLM2-135M: it passes, and faults planted in single layers are named. It does not know
how they are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import pytest
from octavo.engine.llm import LLM
from octavo.engine.models.decoder import Decoder
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.tools.verify import Focus, Text, built_in_texts, transformers_reference, verify

from . import faults

pytestmark = pytest.mark.full
NUM_LAYERS, LAYER = 30, 17


@pytest.fixture(scope="module", autouse=True)
def _load_once() -> Iterator[None]:
    """transformers takes ten seconds for the file; every verification converts the weights anew, to and fro exactly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_reference, "_load", cache(transformers_reference._load))
        yield


def start() -> tuple[LLM, Decoder]:
    llm = LLM("smollm2-135m", device="cpu", kv_cache_tokens=1024)
    runner = llm.engine.core.runner
    assert isinstance(runner, ModelRunner)
    return llm, runner.model


def test_it_passes() -> None:
    llm, _ = start()
    report = verify(llm.engine, built_in_texts(llm.encode, 0))
    assert report.passed, report.first
    assert len(report.conditions) == 6
    assert report.eager is not None
    assert all(each.logits.same_top.all() for each in report.conditions)


@contextmanager
def changed(change: Callable[[Decoder], object], decoder: Decoder) -> Iterator[None]:
    change(decoder)
    yield


def op(name: str, change: Callable[..., object]) -> Callable[[Decoder], AbstractContextManager[None]]:
    return lambda _decoder: faults.broken_op(name, change, layer=LAYER, num_layers=NUM_LAYERS)


FAULTS: dict[str, tuple[Callable[[Decoder], AbstractContextManager[None]], str, str, str]] = {
    "none": (lambda _decoder: nullcontext(), "decoding", "", ""),
    "next position": (op("write_kv", faults.add("positions", 1)), "batched", "op", "write_kv, queries"),
    "wrong block": (
        op("paged_attention_decode", faults.turn_tables),
        "decoding",
        "op",
        "paged_attention_decode",
    ),
    "mask off by one": (
        op("paged_attention_decode", faults.add("seq_lens", -1)),
        "decoding",
        "op",
        "paged_attention_decode",
    ),
    "scale": (op("paged_attention_prefill", faults.times("scale", 1.02)), "batched", "op", "paged_attention_prefill"),
    "epsilon": (
        lambda decoder: changed(lambda it: faults.drop_eps(it, f"layers.{LAYER}.mlp_norm"), decoder),
        "alone",
        "op",
        "rms_norm, norm before the MLP",
    ),
    "one weight": (
        lambda decoder: changed(lambda it: faults.corrupt_weight(it, f"layers.{LAYER}.down", 100, 7, 1536), decoder),
        "alone",
        "weights",
        "down projection",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    plant, condition, detector, expected = FAULTS[name]
    llm, decoder = start()
    texts = [Text(text.name, text.token_ids[:40]) for text in built_in_texts(llm.encode, 0)[:5]]
    with plant(decoder):
        report = verify(llm.engine, texts, focus=Focus(condition))
    first = report.first
    if not detector:
        assert first is None
        return
    assert first is not None
    assert (first.detector, first.layer, first.op) == (detector, LAYER, expected)
