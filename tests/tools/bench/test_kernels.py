"""What has to be right before an op is timed, and what its figures are, with a clock of numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from octavo.engine.errors import ConfigError
from octavo.engine.tools.bench import WrongResultError
from octavo.engine.tools.bench.checking import KernelCase, check
from octavo.engine.tools.bench.kernels import (
    CpuClock,
    best_clock,
    kernel_cases,
    kernel_differences,
    kernel_result,
    prepare,
)
from octavo.kernels import use_backend
from octavo.kernels.dispatch import implementation, override
from octavo.kernels.spec import generator, load_specs

SPECS = load_specs()
CASES = [
    KernelCase(spec, case)
    for spec in SPECS.values()
    for case in spec.cases
    if case.tier == "test" and case.dtype != "float64" and not case.get("draft")
]
SMALL = {
    "gated_activation": "silu-bfloat16",
    "ungated_activation": "gelu-float32",
    "paged_attention_prefill": "ragged-bf16",
    "paged_attention_decode": "int8-bf16",
    "write_kv": "neox-bfloat16",
    "copy_blocks": "chain",
    "expand_rows": "mixed",
    "rms_norm": "bfloat16-residual",
    "layer_norm": "float32",
    "sample": "chat-bfloat16",
    "log_softmax_top": "top-5-bfloat16",
}
"""A case of every op."""


@pytest.fixture(autouse=True)
def _on_torch() -> Iterator[None]:
    with use_backend("torch"):
        yield


def small(op: str) -> KernelCase:
    return KernelCase(SPECS[op], SPECS[op].case(SMALL[op]))


def inputs_of(one: KernelCase) -> dict[str, Any]:
    return one.spec.make_inputs(one.case, generator("bench", one.case.name))


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_what_is_right_is_found_right(one: KernelCase) -> None:
    inputs = inputs_of(one)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    assert check(one, inputs) >= 0.0
    for name, x in before.items():
        assert torch.equal(x.view(torch.uint8) if x.dim() else x, inputs[name].view(torch.uint8) if x.dim() else x)


def nudged(result: Any) -> Any:
    """Return a result of which one number is off by a sixteenth, or by one."""
    if isinstance(result, tuple):
        return type(result)(nudged(result[0]), *result[1:])
    result = result.clone()
    flat = result.view(-1)
    place = int(flat.double().abs().argmax())
    flat[place] = flat[place] * 1.0625 if result.is_floating_point() else flat[place] + 1
    return result


@pytest.mark.parametrize("op", SMALL)
def test_one_wrong_number_is_enough_to_tell_nothing(op: str) -> None:
    def faulty(*arguments: Any, **options: Any) -> Any:
        result = implementation(op, "torch")(*arguments, **options)
        if result is None:  # these write into a cache
            cache = arguments[0 if op == "copy_blocks" else 3]
            cache.copy_(nudged(torch.where(cache.isnan(), 0, cache)).where(~cache.isnan(), cache))
            return None
        result = nudged(result)
        if (out := options.get("out")) is not None:
            out.copy_(result)
        return result

    one = small(op)
    with override(op, faulty), pytest.raises(WrongResultError, match=f"^{one.name}: "):
        check(one, inputs_of(one))


def test_what_is_not_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    one = small("paged_attention_prefill")
    with override(one.spec.name, lambda *_, out, **__: out), pytest.raises(WrongResultError, match="has NaN"):
        check(one, inputs_of(one))
    one = small("write_kv")
    with override(one.spec.name, lambda *_, **__: None), pytest.raises(WrongResultError, match=r"off by|not written"):
        check(one, inputs_of(one))


@pytest.mark.parametrize("cache", ["int8", "e4m3"])
def test_quantised_caches_may_be_off_by_one_step_only(cache: str) -> None:
    one = KernelCase(SPECS["write_kv"], SPECS["write_kv"].case(cache))
    right = implementation("write_kv", "torch")

    def stepped(steps: int) -> Callable[..., None]:
        def write(*arguments: Any, **options: Any) -> None:
            right(*arguments, **options)
            written = arguments[5][0]
            block, offset = divmod(int(written), arguments[3].shape[2])
            # Away from 0 in either dtype, and from where a code would run over.
            code = arguments[3].view(torch.int8)[block, 0, offset]
            code[int(code.abs().argmin())] += steps

        return write

    with override("write_kv", stepped(1)):
        check(one, inputs_of(one))
    with override("write_kv", stepped(3)), pytest.raises(WrongResultError, match=r"k_cache differs .* at 1 places"):
        check(one, inputs_of(one))


@pytest.mark.parametrize(
    ("op", "name", "values"),
    [
        ("rms_norm", "float16-residual", {}),
        ("paged_attention_decode", "ragged", {}),
        ("write_kv", "neox-float16", {"block_size": 16}),
    ],
)
def test_triton_kernels_are_checked_with_their_plans(op: str, name: str, values: dict[str, int]) -> None:
    case = SPECS[op].case(name)
    one = KernelCase(SPECS[op], dataclasses.replace(case, values={**case.values, **values}))
    with use_backend("triton"):
        timed = prepare(one, best_clock())
        timed.call()
    assert 0 < timed.error_u <= 4


class Numbers(CpuClock):
    """A clock that knows what it will say."""

    def samples(self, call: Callable[[], object]) -> list[float]:
        call()
        return [0.003, 0.001, 0.002]


@pytest.mark.parametrize("op", SMALL)
def test_figures_are_those_of_the_specs_counts(op: str) -> None:
    one, clock = small(op), Numbers()
    timed = prepare(one, clock)
    timed.rounds = [clock.samples(timed.call), [0.004, 0.004], [0.008]]
    result = kernel_result(timed)
    assert (result["op"], result["case"], result["num_runs"]) == (op, SMALL[op], 6)
    assert result["round_us"] == pytest.approx([2000, 4000, 8000])
    assert (result["us"], result["us_p10"], result["us_p90"]) == pytest.approx((4000, 1000, 8000))
    assert result["gb_per_s"] == pytest.approx(one.spec.bytes(one.case) / 0.004 / 1e9)
    assert result["tflop_per_s"] == pytest.approx(one.spec.flops(one.case) / 0.004 / 1e12)


def test_every_op_has_a_case_of_a_real_models_size() -> None:
    cases = kernel_cases()
    assert {one.spec.name for one in cases} == set(SPECS)
    assert {one.case.dtype for one in kernel_cases(dtype="float16")} == {"float16"}
    assert [one.spec.name for one in kernel_cases(["rms_norm"])] == ["rms_norm"] * 2
    with pytest.raises(ConfigError, match="--op is 'norm'; allowed: gated_activation, "):
        kernel_cases(["norm"])


def test_the_clock_repeats_what_is_short_and_not_what_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(times) / 64)
    assert CpuClock().samples(lambda: None) == [1 / 64] * 13
    monkeypatch.setattr("time.perf_counter", lambda: float(next(times)))
    assert CpuClock().samples(lambda: None) == [1.0]


def test_cases_are_compared_by_op_case_and_dtype() -> None:
    one, clock = small("rms_norm"), Numbers()
    timed = prepare(one, clock)
    timed.rounds = [[0.001], [0.0011], [0.0009]]
    old = kernel_result(timed)
    slower = {**old, "round_us": [1500.0, 1510.0, 1490.0]}
    (found,), missing = kernel_differences([old], [slower])
    assert (found.verdict, missing) == ("higher", [])
    found_none, missing = kernel_differences([{**old, "dtype": "float32"}], [slower])
    assert (found_none, missing) == ([], ["rms_norm/bfloat16-residual, bfloat16"])
