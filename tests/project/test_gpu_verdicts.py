"""What is made of a run of the GPU suite: which of the wanted figures are met, and the page; the run is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .gpu_benchmarks import RUN, load

acceptance, page, store = load("gpu.acceptance", "gpu.page", "gpu.store")

MEASURED = {"status": "measured"}


def data(**sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    parts = {
        name: {"status": "done", "reason": None, "seconds": 1.0, "cases": cases} for name, cases in sections.items()
    }
    return {"run": RUN, "sections": parts}


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {verdict.figure: verdict.status for verdict in acceptance.judge(found)}


def test_verdicts_are_the_results() -> None:
    nothing = statuses(data())
    assert len(nothing) == 9
    assert set(nothing.values()) == {"not measured"}
    fast = MEASURED | {"bytes": 10**9, "fraction": 0.9, "tflop_per_s": 500.0, "us": 100.0}
    bench = {
        "decode/64x4096": fast | {"beside": {"FlashInfer": {"us": 101.0}, "octavo, fused combine": {"us": 10.0}}},
        "decode/8x512": fast | {"bytes": 10**7, "fraction": 0.1},
        "decode/64x4096-d64": fast | {"fraction": 0.1},
        "prefill/8192": fast | {"beside": {"FlashInfer": {"us": 90.0}, "vLLM Triton": {"reason": "not here"}}},
        "prefill/2048-over-30720": fast | {"tflop_per_s": 400.0},
        "prefill/8192-block16": fast | {"beside": {"FlashInfer": {"us": 20.0}}},
    }
    step = {
        "llama-3.1-8b/64x2048/graphs": MEASURED | {"fraction": 0.85},
        "llama-3.1-8b/64x2048/eager": MEASURED | {"fraction": 0.5},
        "llama-3.1-8b/16x2048/eager": MEASURED | {"fraction": 0.9},
        "llama-3.1-8b/256x512/graphs": MEASURED | {"fraction": 0.85},
        "llama-3.1-8b/256x1024/graphs": MEASURED | {"fraction": 0.7},
        "qwen3-8b/1x512/graphs": MEASURED | {"fraction": 0.99},
        "llama-3.1-8b/1x512/graphs": {"status": "not run", "fraction": 0.99},
    }
    peer = {"ratio": 1.6, "about": {"attention": "sdpa"}}
    engines = {"llama-3.1-8b/offline": MEASURED | {"beside": {"transformers_batching": peer}}}
    found = data(bench=bench, step=step, engines=engines)
    assert statuses(found) == {
        "decode attention": "met",
        "prefill attention, 8192": "met",
        "prefill attention, 2048-over-30720": "NOT MET",
        "decode attention, peers": "met",
        "prefill attention, peers": "NOT MET",
        "decode step, llama-3.1-8b, batch 1": "not measured",
        "decode step, llama-3.1-8b, batch 64": "met",
        "decode step, llama-3.1-8b, batch 256": "NOT MET",
        "throughput": "met",
    }
    bench["prefill/2048-over-30720"]["beside"] = {"SDPA": {"us": 60.0}}
    (verdict,) = (one for one in acceptance.judge(found) if one.figure == "prefill attention, peers")
    assert (verdict.found, verdict.where) == ("0.60 times its speed", "prefill/2048-over-30720, SDPA")
    engines["qwen3-8b/offline"] = MEASURED | {"beside": {"transformers_batching": {"ratio": 1.4}}}
    assert statuses(found)["throughput"] == "NOT MET", "the worst model decides"


def test_the_page_shows_whole_engines(tmp_path: Path) -> None:
    results = store.Store(tmp_path / "suite.json", RUN)
    step = MEASURED | {"us": 6000.0, "floor_us": 5000.0, "fraction": 0.8333, "tokens_per_s": 10_000.0}
    parts = [{"part": "qkv <x>", "us": 100.0, "floor_us": 50.0}, {"part": "o", "us": 10.0, "floor_us": 20.0}]
    results.add("step", "llama-3.1-8b/64x2048/graphs", step)
    results.add("step", "llama-3.1-8b/64x2048/parts", MEASURED | {"us": 110.0, "parts": parts, "by": "device"})
    peer = {"tokens_per_s": 400.0, "ratio": 2.5, "num_equal": 3, "num_answers": 4, "about": {"attention": "sdpa"}}
    beside = {"transformers_batching": peer | {"num_near_ties": 1, "worst_gap": 0.01}, "vllm_offline": {"reason": "no"}}
    results.add("engines", "llama-3.1-8b/offline", MEASURED | {"tokens_per_s": 1000.0, "beside": beside})
    results.add("engines", "x/offline", {"status": "not run", "reason": "out of GPU memory: y"})
    results.add("loading", "tiny/load", MEASURED | {"gb_per_s": {"from disk": 2.5}})
    results.add("memory", "tiny/eager", MEASURED | {"started_bytes": 3 << 29})
    found = page.make_page(results.data)
    for text in (
        "83%",
        "qkv &lt;x&gt;",
        "var(--ours) 50.0%",
        "var(--ours) 100.0%",
        "attention sdpa",
        "3 of 4",
        "1.50 GiB",
    ):
        assert text in found, text
    assert "<td class=''>met</td><td>decode step, llama-3.1-8b, batch 64</td>" in found
    assert "out of GPU memory: y" in found
    assert "http" not in found
    table = page.make_table(results.data)
    assert "met          throughput: at least 1.5 times transformers" in table
    assert "not measured prefill" in table
    assert json.loads((tmp_path / "suite.json").read_text())["sections"]["step"]["cases"]
