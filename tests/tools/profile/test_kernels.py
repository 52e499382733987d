"""This module checks the profile of kernels: its calls, their work, their times, and that what is read of machine code
is what the ahead-of-time report says. It does not know any kernel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import octavo.kernels
import pytest
import torch
from octavo.engine.errors import ConfigError, OctavoError
from octavo.engine.tools.profile import kernels
from octavo.engine.tools.profile.ceilings import measure_ceilings
from octavo.engine.tools.profile.geometry import model_sizes
from octavo.engine.tools.profile.kernel_page import call_table, kernel_page
from octavo.engine.tools.profile.kernels import KernelProfile
from octavo.engine.tools.report import text_lines
from octavo.kernels import dispatch, use_backend
from octavo.kernels.aot.keys import report_settings
from octavo.kernels.aot.targets import GPUS, MODELS, Model

from ...checkpoints import make_model, save_model
from ...kernels.aot.programs import output_of

TINY = Model(4, 2, 16, 64, 96, 320)
ROW: dict[str, Any] = {
    "op": "rms_norm", "kernel": "_rms_norm_kernel", "variant": "norm <b>", "model": "m", "target": "sm_90", "regs": 40,
    "spills": 2, "stack_bytes": 0, "shared_bytes": 2048, "ctas_per_sm": 8, "num_warps": 4, "num_stages": 1,
    "instructions": 500, "loads": {"128": 4, "32": 1}, "stores": {"128": 2}, "async_loads": {}, "mma": {"HGMMA": 12},
    "loop_instructions": 300, "masked_loop_instructions": 320, "masked_mma": {}, "loop_loads": {},
    "loop_async_loads": {}, "mix": {"matrix": 12, "float": 200, "other": 88}, "flop_per_wi": 991.5,
    "bytes_per_wi": None, "constants": {}, "signature": {},
}  # fmt: skip


class Seconds:
    """A clock by which every call takes as many seconds as it is told, a copy and a product too."""

    device = torch.device("cpu")
    caches = "none"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ready(self, call: Callable[[], object]) -> Callable[[], object]:
        call()
        return call

    def samples(self, call: Callable[[], object]) -> list[float]:
        return [self.seconds] * 3


@pytest.fixture(autouse=True)
def _torch_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


def profile(**changes: Any) -> KernelProfile:
    return KernelProfile("tiny", TINY, **{"targets": ["sm_90"], "only": ("norm", "activation")} | changes)


def timed(found: KernelProfile, num_rounds: int = 2) -> dict[str, Any]:
    """Run all that is timed; return the document."""
    calls = list(found.prepare())
    for _ in range(num_rounds):
        assert list(found.time(calls)) == calls
    found.finish_times(calls)
    return found.document


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_every_op_with_the_work_of_its_spec(name: str) -> None:
    calls = KernelProfile(name, MODELS[name], targets=["sm_90"]).document["calls"]
    ops = {call["op"] for call in calls}
    assert {"paged_attention_prefill", "paged_attention_decode", "write_kv", "copy_blocks", "sample"} <= ops
    assert len(ops) == 8
    assert len({call["name"] for call in calls}) == len(calls)
    for call in calls:
        assert call["bytes"] > 0
        assert call["flops_per_byte"] == call["flops"] / call["bytes"]


def test_work_of_llama_3_8b_is_what_a_hand_computes() -> None:
    found = {
        call["name"]: call for call in KernelProfile("l", MODELS["llama-3-8b"], targets=["sm_90"]).document["calls"]
    }
    # 64 sequences of 2,048 keys and values of 8 heads of 128 in bfloat16, and a query and a result of 32 heads each.
    decode = found["paged_attention_decode, 64 × 2048"]
    assert decode["bytes"] == 64 * (2 * 2048 * 8 * 128 * 2 + 2 * 32 * 128 * 2)
    assert decode["flops"] == 4 * 64 * 2048 * 32 * 128
    assert decode["bound_by"] == "memory"
    prefill = found["paged_attention_prefill, a prompt of 2048"]
    assert prefill["flops"] == 4 * (2048 * 2049 // 2) * 32 * 128
    assert prefill["bound_by"] == "arithmetic"


@pytest.mark.parametrize("cache", ["int8", "e4m3"])
def test_a_quantised_cache_is_read_in_half_the_bytes(cache: str) -> None:
    plain, quantised = (
        {call["name"]: call["bytes"] for call in profile(only=("decode",), cache=kind).document["calls"]}
        for kind in ("auto", cache)
    )
    assert plain.keys() == quantised.keys() != set()
    assert all(0.5 <= quantised[name] / plain[name] < 0.51 for name in plain)


def test_ceilings_without_a_run_are_called_data_sheets() -> None:
    (ceiling,) = profile().document["ceilings"]
    assert "data sheet" in ceiling["name"]
    assert profile().document["machine"] is None


def test_times_become_rates_and_parts_of_what_was_measured() -> None:
    document = timed(profile(clock=Seconds(1e-3)))
    assert document["about"]["backend"] == "torch"
    assert document["about"]["sizes"]["dtype"] == "float32"
    ceiling = document["ceilings"][0]
    assert "measured" in ceiling["name"]
    for call in document["calls"]:
        floor_s = max(call["bytes"] / ceiling["bytes_per_s"], call["flops"] / ceiling["flops_per_s"])
        assert math.isclose(call["fraction"], floor_s / 1e-3)
        assert math.isclose(call["bytes_per_s"], call["bytes"] * 1e3)
        assert document["metrics"][call["name"]]["values"] == [1e-3, 1e-3]


def test_a_wrong_result_is_not_timed() -> None:
    def wrong(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return right(x, *args, **kwargs) * 1.01

    right = dispatch.active["gated_activation"]
    found = profile(clock=Seconds(1.0), only=("activation",))
    with dispatch.override("gated_activation", wrong), pytest.raises(OctavoError, match="gated_activation"):
        timed(found)


def test_what_was_not_timed_before_the_end_has_no_time() -> None:
    found = profile(clock=Seconds(1.0))
    calls = list(found.prepare())
    running = found.time(calls)
    next(running)
    found.finish_times(calls)
    assert [call["seconds"] for call in found.document["calls"]] == [1.0] + [None] * (len(calls) - 1)
    assert "1.00 s" in "\n".join(text_lines(*call_table(found.document)))
    kernel_page(found.document, [], [])


def test_ceilings_are_bytes_and_products_over_seconds() -> None:
    ceilings, seconds = measure_ceilings(Seconds(0.5), torch.float32)
    assert seconds == dict.fromkeys(("matmul", "a copy in memory", "a copy in its caches"), [0.5] * 3)
    in_caches, in_memory = ceilings
    assert in_memory.flops_per_s == 2 * 1024**3 / 0.5
    assert in_memory.bytes_per_s == 2 * (128 << 20) / 0.5
    assert in_caches.bytes_per_s == 2 * (1 << 18) / 0.5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"targets": ["sm_70"]}, "--target is 'sm_70'; allowed: sm_80, "),
        ({"cache": "int4"}, "cache_dtype is 'int4'"),
        ({"block_sizes": [0]}, "--block-size is 0; allowed: 16"),
    ],
)
def test_what_no_engine_has_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=says):
        profile(**changes)


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET"):
        profile().variants()


def test_sizes_of_a_model_are_those_of_its_config(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = save_model(
        tmp_path,
        make_model("Qwen3", vocab_size=320, head_dim=16, num_hidden_layers=1, max_position_embeddings=64, **sizes),
    )
    assert model_sizes(str(folder)) == Model(4, 2, 16, 64, 96, 320, "float32", head_norm=True, rotary_dim=16)


def test_the_page_shows_what_was_read_and_marks_spills() -> None:
    found = profile()
    found.document["rows"] = [ROW]
    page = kernel_page(found.document, [], [])
    assert "norm &lt;b&gt;" in page
    assert '<td class="bad n" data-name="spills" data-key="2">' in page
    for text in ("12 HGMMA", "4×128 1×32", "masked 320", "991.5", 'title="float: 200"', "2.0"):
        assert text in page


def test_what_is_compiled_is_what_a_report_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Variant:
        op = "rms_norm"

        class launch:  # noqa: N801
            kernel = "_rms_norm_kernel"

    def list_variants(*args: Any) -> list[Any]:
        asked.append(args)
        return [Variant]

    monkeypatch.setattr(kernels, "list_variants", list_variants)
    monkeypatch.setattr(octavo.kernels, "interpreted", lambda: False)
    monkeypatch.setattr(kernels, "make_rows", lambda *args, **kwargs: [dict(ROW)])
    found = profile(targets=["sm_80", "sm_90"], block_sizes=(64, 16))
    assert found.variants() == [Variant, Variant]
    assert asked == [(TINY, report_settings([64, 16]), GPUS[target]) for target in ("sm_80", "sm_90")]
    found.compile(found.variants(), cache=Path(), num_workers=1, advance=lambda: None)
    assert found.document["rows"] == [ROW]
    assert {name: metric["values"] for name, metric in found.document["metrics"].items()} == {
        "sm_90 _rms_norm_kernel, norm <b>: spills": [2],
        "sm_90 _rms_norm_kernel, norm <b>: loop instructions": [300],
    }
    with pytest.raises(ConfigError, match="--only is nothing; allowed: parts of _rms_norm_kernel, rms_norm"):
        profile(only=("nothing",)).variants()


@pytest.mark.full
def test_rows_are_those_of_the_ahead_of_time_report(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    options = ("--geometry", "smollm2-135m", "--only", "_activation_kernel,_copy_kernel", "--block-size", "64", "-q")
    run = "from octavo.engine.cli import main; main()"
    output_of("-P", "-c", run, "profile", "kernels", *options, "--json", str(ours), **cache)
    options = ("--model", "smollm2-135m", "--kernel", "_activation_kernel,_copy_kernel", "--block-size", "64")
    output_of("-P", "-m", "octavo.kernels.aot", "report", *options, "--target", "sm_90", "--json", str(theirs), **cache)
    found, expected = json.loads(ours.read_text()), json.loads(theirs.read_text())
    assert found["rows"] == expected["rows"] != []
    assert found["versions"]["triton"] == expected["triton"]
    spills = {name for name in found["metrics"] if name.endswith(": spills")}
    assert len(spills) == len(expected["rows"])
