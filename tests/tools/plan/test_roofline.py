"""This module holds the roofline of a step against closed forms. It does not know plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.config import ModelConfig, RopeConfig
from octavo.engine.footprint import kv_bytes_per_token, num_weights, weight_groups
from octavo.engine.tools.gpus import Gpu, find_gpu
from octavo.engine.tools.roofline import LAUNCHES_PER_LAYER, LAUNCHES_PER_STEP, Roofline, StepWork

LLAMA = ModelConfig(
    family="llama", vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_q_heads=32,
    num_kv_heads=8, head_dim=128, max_position=131_072, rope=RopeConfig(5e5, 128), dtype="bfloat16",
)  # fmt: skip
H100 = find_gpu("h100")
ENDLESS = 1e30


def card(bandwidth: float, flops: float) -> Gpu:
    return replace(H100, bandwidth_bytes_per_s=bandwidth, flops={"bfloat16": flops, "float32": flops})


steps = st.lists(
    st.integers(1, 300).flatmap(lambda query: st.tuples(st.just(query), st.integers(query, 2000))),
    min_size=1,
    max_size=9,
)


@given(steps)
def test_work_is_what_a_loop_counts(sequences: list[tuple[int, int]]) -> None:
    pairs = sum(position + 1 for query, length in sequences for position in range(length - query, length))
    work = StepWork.of(sequences)
    assert work.attention_pairs == pairs
    assert work.num_tokens == sum(query for query, _ in sequences)
    assert work.kv_tokens_read == sum(length for _, length in sequences)
    assert work.num_sampled == work.num_seqs == len(sequences)
    assert StepWork.of(sequences, 0) == work._replace(num_sampled=0)


@given(steps, st.sampled_from([(), (512,) * 32, (None, 512) * 16]))
def test_parts_add_up_to_the_step(sequences: list[tuple[int, int]], windows: tuple[int | None, ...]) -> None:
    roofline = Roofline(replace(LLAMA, windows=windows), H100, dtype="bfloat16", launch_s=1e-6)
    for work in (StepWork.of(sequences), StepWork.of(sequences, 0)):
        assert sum(part.seconds for part in roofline.parts(work)) == pytest.approx(roofline.step_s(work))


def test_decode_reads_every_weight_and_key_once() -> None:
    """With endless arithmetic only bytes count: weights but for the embedding, keys, values, what tokens hold."""
    roofline = Roofline(LLAMA, card(1e12, ENDLESS), dtype="bfloat16")
    work = StepWork.of([(1, 4096)] * 16)
    weights = 2 * (num_weights(LLAMA) - weight_groups(LLAMA)["embedding"] - weight_groups(LLAMA)["norms"])
    kv = 16 * 4096 * kv_bytes_per_token(LLAMA, "bfloat16")
    tokens = roofline.step_s(work) * 1e12 - weights - kv
    assert 0 < tokens < 0.01 * (weights + kv)
    twice = roofline.step_s(StepWork.of([(1, 8192)] * 16))
    assert twice - roofline.step_s(work) == pytest.approx(kv / 1e12)


def test_prefill_multiplies_every_weight_with_every_token() -> None:
    """With endless bandwidth only arithmetic counts: two operations a weight and token, four a pair and element."""
    roofline = Roofline(LLAMA, card(ENDLESS, 1e15), dtype="bfloat16")
    groups = weight_groups(LLAMA)
    flops = 2 * 2048 * (groups["attention"] + groups["mlp"]) + 2 * groups["head"]
    flops += 4 * 32 * 32 * 128 * 2048 * 2049 // 2
    assert roofline.step_s(StepWork.of([(2048, 2048)])) == pytest.approx(flops / 1e15)


def test_keys_and_values_of_fewer_bits_are_read_in_less_time() -> None:
    work = StepWork.of([(1, 100_000)])
    times = {
        name: Roofline(LLAMA, card(1e12, ENDLESS), dtype="bfloat16", kv_cache_dtype=name).step_s(work)
        for name in ("bfloat16", "int8", "fp8")
    }
    assert times["bfloat16"] - times["fp8"] == pytest.approx(100_001 * 65_536 / 1e12)
    assert times["int8"] - times["fp8"] == pytest.approx(100_001 * 2 * 32 * 8 * 4 / 1e12)


def test_a_window_bounds_what_is_read_and_what_is_multiplied() -> None:
    whole = Roofline(LLAMA, H100, dtype="bfloat16")
    for windows in ((512,) * 32, (None,) * 16 + (512,) * 16):
        part = Roofline(replace(LLAMA, windows=windows), H100, dtype="bfloat16")
        for short in (StepWork.of([(1, 400)] * 9), StepWork.of([(300, 300)])):
            assert part.step_s(short) == pytest.approx(whole.step_s(short))
        for long in (StepWork.of([(1, 50_000)] * 9), StepWork.of([(2048, 50_000)])):
            assert part.step_s(long) < 0.9 * whole.step_s(long)
    narrow = Roofline(replace(LLAMA, windows=(512,) * 32), card(1e12, ENDLESS), dtype="bfloat16")
    for query_len, num_seqs in ((1, 9), (100, 2)):
        parts = {part.name: part for part in narrow.parts(StepWork.of([(query_len, 50_000)] * num_seqs))}
        # The first token sees 511 before it; every token is written, and has a q and an output.
        num_bytes = (511 + 2 * query_len) * 131_072 + query_len * 32 * 2 * 4096 * 2
        assert parts["attention"].num_bytes == pytest.approx(num_seqs * num_bytes)
        assert parts["attention"].flops == num_seqs * query_len * 512 * 4 * 32 * 4096


def test_efficiency_and_launches_make_it_slower() -> None:
    work = StepWork.of([(1, 1000)] * 4)
    bound = Roofline(LLAMA, H100, dtype="bfloat16").step_s(work)
    half = Roofline(LLAMA, H100, dtype="bfloat16", bandwidth_efficiency=0.5, flops_efficiency=0.5).step_s(work)
    assert half == pytest.approx(2 * bound)
    launched = Roofline(LLAMA, H100, dtype="bfloat16", launch_s=1e-6).step_s(work)
    assert launched - bound == pytest.approx(1e-6 * (32 * LAUNCHES_PER_LAYER + LAUNCHES_PER_STEP))


def test_what_binds() -> None:
    roofline = Roofline(LLAMA, H100, dtype="bfloat16")
    assert roofline.bound([StepWork.of([(1, 4096)])]) == "memory"
    assert roofline.bound([StepWork.of([(2048, 2048)], 0)] * 3) == "arithmetic"
