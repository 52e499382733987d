"""What the GPU benchmarks measure, where there is no GPU: with a clock of numbers, and other libraries' stand-ins that
compute from what they are given.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from octavo.kernels import paged_attention_decode, use_backend
from octavo.kernels.dispatch import implementation, override
from octavo.kernels.spec import Case, load_specs
from torch import Tensor

from .gpu_benchmarks import RATES, RUN, load

SMALL = {"num_kv_heads": 2, "group_size": 2, "head_dim": 64, "block_size": 16}
cases, checking, kernels = load("gpu.cases", "gpu.checking", "gpu.kernels")
bits, page, store, timing, peers = load("gpu.bits", "gpu.page", "gpu.store", "gpu.timing", "peers")


@pytest.fixture(autouse=True)
def _on_torch() -> Iterator[None]:
    with use_backend("torch"):
        yield


class Numbers:
    """A clock that runs each call once and says what it was told."""

    def __init__(self, **seconds: float) -> None:
        self._seconds = seconds

    def samples(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [self._seconds.get(name, 1e-3)] * 5 for name in calls}

    def graphed(self, call: Callable[[], object]) -> Callable[[], object]:
        return call


def bench(op: str, case: Case) -> Any:
    return cases.Bench(load_specs()[op], case)


def attention(op: str, seqs: tuple[tuple[int, int], ...], **values: Any) -> Any:
    return bench(f"paged_attention_{op}", Case("small", {**SMALL, "seqs": seqs, **values}, "float16", "bench"))


def measured(one: Any, **options: Any) -> dict[str, Any]:
    inputs = cases.make_inputs(one, torch.device("cpu"))
    found: dict[str, Any] = kernels.measure(one, inputs, Numbers(**options), RATES, with_peers=True)
    return found


def test_a_case_is_timed_beside_what_is_there() -> None:
    one = attention("decode", ((1, 40), (1, 40)))
    found = measured(one, octavo=1e-4)
    assert found["status"] == "measured"
    assert (found["us"], found["graph"], found["bound_by"]) == (100.0, True, "memory")
    assert found["bytes"] == one.spec.bytes(one.case)
    assert found["fraction"] == pytest.approx(found["bytes"] / 1e12 / 1e-4, abs=1e-4)
    assert found["beside"]["torch SDPA, gathered before"]["us"] == 1000.0
    assert found["beside"]["torch SDPA, gathering"]["max_abs_diff"] < 0.01
    assert "not here" in found["beside"]["FlashInfer"]["reason"] or "us" in found["beside"]["FlashInfer"]


@pytest.mark.parametrize("options", [{"window": 7}, {"soft_cap": 2.0}])
def test_options_are_checked_with(options: dict[str, Any]) -> None:
    found = measured(attention("decode", ((9, 40),), **options))
    assert found["status"] == "measured"
    assert "not with" in found["beside"]["torch SDPA, gathering"]["reason"]


def test_both_forms_of_combine() -> None:
    with use_backend("triton"):
        one = attention("decode", ((1, 40), (1, 600)), num_kv_heads=1)
        inputs = cases.make_inputs(one, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        found = kernels.measure(one, inputs, Numbers(), {}, with_peers=False)
    assert {"octavo, planning in the call", "octavo, fused combine"} == set(found["beside"])
    assert "fraction" not in found


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_a_wrong_result_is_not_timed(op: str) -> None:
    one = attention(op, ((1, 40), (1, 70)))
    right = octavo_op(op)

    def off(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        out[1] *= 1.01  # the first sequence is right
        return out

    with override(f"paged_attention_{op}", off), pytest.raises(AssertionError, match="off by"):
        measured(one)


def octavo_op(op: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = implementation(f"paged_attention_{op}", "torch")
    return found


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("rms_norm", "bfloat16-residual"),
        ("layer_norm", "float16"),
        ("gated_activation", "silu-bfloat16"),
        ("write_kv", "neox-bfloat16"),
        ("copy_blocks", "chain-bf16"),
        ("sample", "chat-bfloat16"),
        ("log_softmax_top", "top-5-bfloat16"),
    ],
)
def test_other_ops(op: str, case: str) -> None:
    one = bench(op, load_specs()[op].case(case))
    assert measured(one)["error_u"] == 0.0


def test_results_that_differ() -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert checking.same_result("x", x, x, 1.0) == 0.0
    with pytest.raises(AssertionError, match="off by"):
        checking.same_result("x", x * 1.02, x, 1.0)
    with pytest.raises(AssertionError, match="not written"):
        checking.same_result("x", x, torch.full_like(x, float("nan")), 1.0)
    with pytest.raises(AssertionError, match="differs"):
        checking.same_result("x", torch.tensor([1]), torch.tensor([2]), 1.0)
    with pytest.raises(AssertionError, match="off by"):
        checking.same_result("x", torch.tensor([1.0]), torch.tensor([1.00001]), None)


def test_what_is_timed() -> None:
    quick, normal, full = (cases.benches(level) for level in ("quick", "normal", "full"))
    names = [{one.name for one in level} for level in (quick, normal, full)]
    for group in cases.GROUPS:
        first = [one.name for one in quick if one.group == group]
        assert first == [one.name for one in full if one.group == group][: len(first)], "what decides comes first"
    assert names[0] < names[1] < names[2]
    assert len(names[2]) == len(full)
    timed = {one.spec.name for one in normal}
    assert timed == set(load_specs())
    assert {one.group for one in full} == set(cases.GROUPS)
    found = {one.name: one for one in full}
    assert cases.input_bytes(found["decode/256x32768"]) > 256 * 32768 * 4096
    inputs = cases.make_inputs(found["decode/8x512-block16"], torch.device("meta"))
    assert inputs["k_cache"].shape == (1 + 8 * 32, 8, 16, 128)


def test_bits_differ() -> None:
    x = torch.tensor([1.0, 2.0])
    assert bits.differing(x, x.clone())["equal"]
    assert bits.differing(x, torch.nextafter(x, torch.tensor(9.0)))["num_differing"] == 2
    assert not bits.differing(torch.tensor([0.0]), torch.tensor([-0.0]))["equal"]


def test_the_page_shows_what_was_found(tmp_path: Path) -> None:
    results = store.Store(tmp_path / "suite.json", RUN)
    results.add("ceilings", "copy", {"status": "measured", **RATES})
    results.add("tests", "tests/a.py::test_<x>", {"status": "failed", "reason": "1 < 2", "seconds": 0.5})
    facts = timing.roofline(1e-4, 10**7, 10**9, RATES) | timing.summary([1e-4] * 5)
    slower = {"FlashInfer": facts | {"us": 200.0}, "vLLM Triton": {"reason": "not here: x"}}
    results.add("bench", "decode/64x4096", {"status": "measured", **facts, "beside": slower})
    found = page.make_page(results.data)
    assert found.count("<svg") == 1
    assert "decode/64x4096: 10 TFLOP/s at 100 FLOP/byte" in found
    assert "width:50.0%" in found
    assert "vLLM Triton is not here: x" in found
    assert "test_&lt;x&gt;" in found
    assert "1 &lt; 2" in found
    assert "http" not in found
    assert "decode/64x4096" in page.make_table(results.data)


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend the last rows of one sequence: q [rows, heads, d], keys and values [tokens, kv heads, d]."""
    group_size = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group_size, 1).float() for x in (keys, values))
    scores = torch.einsum("rhd,thd->hrt", q.float(), keys) * scale
    rows, tokens = scores.shape[1:]
    later = torch.ones(rows, tokens).triu(tokens - rows + 1).bool()
    return torch.einsum("hrt,thd->rhd", scores.masked_fill(later, float("-inf")).softmax(-1), values).to(q.dtype)


class FakeWrapper:
    """FlashInfer's wrapper, as far as we call it: HND pages by index list."""

    def __init__(self, workspace: Tensor, layout: str, **_: Any) -> None:
        assert layout == "HND"

    def plan(self, *lists: Tensor, page_size: int, sm_scale: float, **_: Any) -> None:
        *starts, self.first, self.blocks, self.last = lists
        self.starts = starts[0] if starts else torch.arange(len(self.first))
        self.page_size, self.scale = page_size, sm_scale

    def run(self, q: Tensor, caches: tuple[Tensor, Tensor], out: Tensor) -> None:
        for s in range(len(self.last)):
            own = self.blocks[self.first[s] : self.first[s + 1]].long()
            length = (len(own) - 1) * self.page_size + int(self.last[s])
            keys, values = (cache[own].transpose(1, 2).flatten(0, 1)[:length] for cache in caches)
            rows = slice(int(self.starts[s]), int(self.starts[s + 1]))
            out[rows] = dense_attention(q[rows], keys, values, self.scale)


def fake_unified_attention(**given: Any) -> None:
    starts, block_size = given["cu_seqlens_q"].tolist(), given["k"].shape[1]
    for s, length in enumerate(given["seqused_k"].tolist()):
        own = given["block_table"][s, : -(-length // block_size)].long()
        keys, values = (given[name][own].flatten(0, 1)[:length] for name in ("k", "v"))
        rows = slice(starts[s], starts[s + 1])
        given["out"][rows] = dense_attention(given["q"][rows], keys, values, given["softmax_scale"])


def fake_decode_attention_fwd(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, first: Tensor, slots: Tensor, *rest: Any, logit_cap: float
) -> None:
    scale = rest[4]
    for s in range(len(q)):
        own = slots[first[s] : first[s + 1]]
        out[s : s + 1] = dense_attention(q[s : s + 1], keys[own], values[own], scale)


def fake_extend_attention_fwd(
    q: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    first: Tensor,
    slots: Tensor,
    mask: None,
    is_causal: bool,
    mask_starts: None,
    longest: int,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> None:
    assert is_causal
    assert longest == int(starts.diff().max())
    for s in range(len(first) - 1):
        rows, before = slice(int(starts[s]), int(starts[s + 1])), slots[first[s] : first[s + 1]]
        seen, weighed = torch.cat((keys[before], own_keys[rows])), torch.cat((values[before], own_values[rows]))
        out[rows] = dense_attention(q[rows], seen, weighed, sm_scale)


FAKES: dict[str, dict[str, Any]] = {
    "flashinfer": {
        "BatchDecodeWithPagedKVCacheWrapper": FakeWrapper,
        "BatchPrefillWithPagedKVCacheWrapper": FakeWrapper,
    },
    "triton_unified_attention": {"unified_attention": fake_unified_attention},
    "decode_attention": {"decode_attention_fwd": fake_decode_attention_fwd},
    "extend_attention": {"extend_attention_fwd": fake_extend_attention_fwd},
}


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_peers_get_what_we_get(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, contents in FAKES.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "_given_up", {})
    for package in ("vllm", "sglang"):
        monkeypatch.setitem(sys.modules, package, None)
    one = attention(op, ((1, 40), (1, 7), (1, 64)) if op == "decode" else ((5, 40), (17, 17), (1, 3)))
    inputs = cases.make_inputs(one, torch.device("cpu"))
    expected = octavo_op(op)(**inputs)
    found = {}
    for name, peer in peers.find(op):
        if name != "torch flex_attention":  # compiling it takes a minute
            found[name], call = peers.prepare(peer, one.case, inputs, expected)
            assert (call is None) == ("reason" in found[name])
    wanted = {"FlashInfer", "vLLM Triton", "SGLang Triton, 8 splits" if op == "decode" else "SGLang Triton"}
    assert {name for name, facts in found.items() if "reason" not in facts} >= wanted, found
    assert found["torch SDPA, gathering"]["reason"] == "only for sequences of equal length"


@pytest.mark.parametrize("seqs", [((5, 40), (5, 40)), ((17, 17),), ((1, 9), (1, 9))])
def test_sdpa_sees_what_a_chunk_sees(seqs: tuple[tuple[int, int], ...]) -> None:
    one = attention("prefill", seqs)
    inputs = cases.make_inputs(one, torch.device("cpu"))
    ways = {name: peer for name, peer in peers.find("prefill") if name.startswith("torch SDPA")}
    assert len(ways) == 2
    for peer in ways.values():
        facts, call = peers.prepare(peer, one.case, inputs, octavo_op("prefill")(**inputs))
        assert call is not None, facts


def test_a_peer_that_is_never_ready_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PREPARATION_S", 0.05)
    monkeypatch.setattr(peers, "_given_up", {})
    asked = []

    def make(case: Case, inputs: dict[str, Any]) -> Any:
        asked.append(case)
        time.sleep(30)

    one = attention("decode", ((1, 40),))
    for _ in range(2):
        facts, call = peers.prepare(peers.Peer("slow", make), one.case, {}, torch.zeros(1))
        assert (call, facts["reason"]) == (None, "not ready after 0 s")
    assert len(asked) == 1


def test_a_peer_is_not_compiled_for_what_it_does_not_see() -> None:
    one = attention("prefill", ((17, 17),), block_size=16)
    (peer,) = (peer for name, peer in peers.find("prefill") if name == "torch flex_attention")
    inputs = cases.make_inputs(one, torch.device("cpu"))
    facts, call = peers.prepare(peer, one.case, inputs, octavo_op("prefill")(**inputs))
    assert (call, "gathered before" in facts["reason"]) == (None, True)


def test_a_peer_that_disagrees_is_not_timed() -> None:
    one = attention("decode", ((1, 40),))
    inputs = cases.make_inputs(one, torch.device("cpu"))
    expected = paged_attention_decode(**inputs)
    wrong = peers.Peer("wrong", lambda case, inputs: lambda: 1.1 * expected)
    facts, call = peers.prepare(wrong, one.case, inputs, expected)
    assert call is None
    assert "disagrees" in facts["reason"]
