"""This module plants faults in a tiny engine and holds what verify says of each: layer, op, position. It does not know
how they are found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from octavo.engine.llm import LLM
from octavo.engine.models.decoder import Decoder
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.tools.verify import Report
from octavo.engine.tools.verify.ops import OpDetector
from octavo.kernels import dispatch
from octavo.kernels.attention import gather
from octavo.kernels.kv_cache import reference as kv_cache_reference
from octavo.kernels.spec import generator, load_specs

from . import faults
from .conftest import Check

LAYER = 1


def decoder_of(llm: LLM) -> Decoder:
    runner = llm.engine.core.runner
    assert isinstance(runner, ModelRunner)
    return runner.model


def assert_named(report: Report, detector: str, layer: int | None, op: str) -> None:
    assert not report.passed
    first = report.first
    assert first is not None
    assert (first.detector, first.layer, first.op) == (detector, layer, op), first


OPS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str, str]] = {
    "rotated as the next position": ("write_kv", faults.add("positions", 1), "batched", "write_kv, queries"),
    "first block of another": (
        "paged_attention_prefill",
        faults.turn_tables,
        "batched",
        "paged_attention_prefill",
    ),
    "newest key masked": ("paged_attention_decode", faults.add("seq_lens", -1), "decoding", "paged_attention_decode"),
    "scale": ("paged_attention_decode", faults.times("scale", 1.02), "decoding", "paged_attention_decode"),
    "written one slot on": ("write_kv", faults.add("slot_mapping", 1), "alone", "write_kv, keys"),
}


@pytest.mark.parametrize("name", OPS)
def test_a_wrong_op_is_named(name: str, check: Check) -> None:
    op, change, condition, expected = OPS[name]
    with faults.broken_op(op, change, layer=LAYER):
        report = check(condition)
    assert_named(report, "op", LAYER, expected)
    first = report.first
    assert first is not None
    assert first.error_units is not None
    assert first.eager_units is not None
    assert first.error_units > 100 * first.eager_units


def test_a_fault_of_one_step_is_found_where_no_op_was_replayed(check: Check) -> None:
    """Only steps whose kind is new are replayed at first; here it is one in the middle of its kind that is wrong."""

    def change(kwargs: dict[str, Any]) -> None:
        if int(kwargs["seq_lens"].max()) == 33:
            kwargs["scale"] *= 1.5

    with faults.broken_op("paged_attention_decode", change, layer=LAYER):
        report = check("decoding")
    assert_named(report, "op", LAYER, "paged_attention_decode")
    (condition,) = report.conditions
    detectors = [each.detector for each in condition.findings]
    assert detectors[:2] == ["op", "layer"]
    assert condition.findings[1].step == condition.findings[0].step > condition.num_replayed_steps


def test_a_mask_that_is_off_by_one_in_the_torch_backend_itself_is_named(
    monkeypatch: pytest.MonkeyPatch, check: Check
) -> None:
    real = gather._visible

    def wrong(first: int, stop: int, *keys: Any) -> torch.Tensor:
        return real(max(first - 1, 0), max(stop - 1, 1), *keys) if first > 0 else real(first, stop, *keys)

    monkeypatch.setattr(gather, "_visible", wrong)
    report = check("chunked")
    assert report.first is not None
    assert (report.first.detector, report.first.layer) == ("op", 0)
    assert report.first.op in faults.ATTENTION


def test_a_fault_in_code_that_is_replayed_by_itself_is_named_by_its_layer(
    monkeypatch: pytest.MonkeyPatch, check: Check
) -> None:
    rotate = kv_cache_reference.rotate
    monkeypatch.setattr(kv_cache_reference, "rotate", lambda x, cos, sin, style: rotate(x, cos, -sin, style))
    report = check("batched")
    assert_named(report, "layer", 0, "hidden state")
    assert report.first is not None
    assert "write_kv runs the same code on the torch backend" in report.first.message


@pytest.mark.parametrize(
    ("part", "op"),
    [("attention_norm", "rms_norm, norm before attention"), ("mlp_norm", "rms_norm, norm before the MLP")],
)
def test_a_dropped_epsilon_is_named(part: str, op: str, llm: LLM, check: Check) -> None:
    faults.drop_eps(decoder_of(llm), f"layers.{LAYER}.{part}")
    report = check("alone")
    assert_named(report, "op", LAYER, op)
    assert report.first is not None
    assert "eps is 0.0, and 1e-06 in the reference" in report.first.message


def test_an_op_that_ignores_epsilon_is_named(check: Check) -> None:
    with faults.broken_op("rms_norm", lambda kwargs: kwargs.update(eps=0.0)):
        assert_named(check("alone"), "op", 0, "rms_norm, norm before attention")


def test_another_activation_is_named(monkeypatch: pytest.MonkeyPatch, llm: LLM, check: Check) -> None:
    monkeypatch.setattr(decoder_of(llm)._layers[LAYER].mlp, "_kind", "gelu")
    assert_named(check("alone"), "op", LAYER, "gated_activation")


@pytest.mark.parametrize(
    ("name", "row", "column", "num_inputs", "op"),
    [
        ("layers.1.down", 3, 5, 96, "down projection"),
        ("layers.0.qkv", 100, 59, 60, "qkv projection"),
        ("lm_head", 299, 0, 60, "head"),
    ],
)
def test_a_corrupted_weight_is_named(
    name: str, row: int, column: int, num_inputs: int, op: str, llm: LLM, check: Check
) -> None:
    faults.corrupt_weight(decoder_of(llm), name, row, column, num_inputs)
    report = check("alone")
    layer = int(name.split(".")[1]) if "." in name else None
    assert_named(report, "weights", layer, op)
    assert f"weight [{row}, {column}] is" in report.findings[0].message
    assert [each for each in report.findings if (each.detector, each.layer, each.op) == ("op", layer, op)]


def test_wrong_positions_are_named(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    faults.break_inputs(monkeypatch, lambda inputs: inputs._replace(positions=inputs.positions + 1))
    report = check("alone")
    assert_named(report, "metadata", 0, "write_kv, positions")
    assert report.first is not None
    assert report.first.position == 0


def test_a_wrong_slot_is_named(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    faults.break_inputs(monkeypatch, lambda inputs: inputs._replace(slot_mapping=inputs.slot_mapping.flip(0)))
    assert_named(check("alone"), "metadata", 0, "write_kv, slot_mapping")


def test_a_wrong_block_is_named(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    faults.break_inputs(monkeypatch, lambda inputs: inputs._replace(block_table=inputs.block_table.roll(1, 0)))
    report = check("decoding")
    assert_named(report, "metadata", 0, "paged_attention_decode, block_table")


def test_a_block_of_other_tokens_is_named(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    """The scheduler itself is wrong: everybody after it believes the table."""
    faults.give_foreign_blocks(monkeypatch)
    report = check("prefix hits")
    assert_named(report, "metadata", 0, "paged attention, block_table")
    assert report.first is not None
    assert "where the keys of other tokens, or none, were written" in report.first.message


def test_wrong_tokens_are_named(monkeypatch: pytest.MonkeyPatch, check: Check) -> None:
    faults.break_inputs(monkeypatch, lambda inputs: inputs._replace(token_ids=(inputs.token_ids + 1) % 256))
    assert_named(check("alone"), "metadata", None, "embedding, token_ids")


def test_a_corrupted_embedding_is_named(llm: LLM, check: Check, texts: list[Any]) -> None:
    with torch.inference_mode():
        decoder_of(llm)._embedding[texts[0].token_ids[5], 7] += 0.01
    report = check("alone")
    first = report.first
    assert first is not None
    assert (first.detector, first.op, first.text, first.position) == ("layer", "embedding", "text 0", 5)


def test_logits_of_another_row_are_found(monkeypatch: pytest.MonkeyPatch, llm: LLM, check: Check) -> None:
    """Nothing in the layers is wrong: the sampler is handed the logits of its neighbours."""
    logits = Decoder.logits
    monkeypatch.setattr(
        ModelRunner,
        "execute",
        _handing_on(lambda hidden: logits(decoder_of(llm), hidden.roll(1, 0)), ModelRunner.execute),
    )
    report = check("decoding")
    assert report.first is not None
    assert report.first.detector == "logits"


def _handing_on(wrong: Callable[[torch.Tensor], torch.Tensor], execute: Callable[..., Any]) -> Callable[..., Any]:
    def broken(self: ModelRunner, step: Any) -> Any:
        tap = self.model
        real = tap.logits
        tap.logits = wrong  # type: ignore[method-assign]
        try:
            return execute(self, step)
        finally:
            tap.logits = real  # type: ignore[method-assign]

    return broken


def scene(op: str, case: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return an op and the inputs of one of its cases, for features that no model of ours has."""
    spec = load_specs()[op]
    return dispatch.active[op], spec.make_inputs(spec.case(case), generator(op, case))


def wrong_ops(op: str, broken: Callable[..., Any], inputs: dict[str, Any]) -> list[str]:
    """Return what the op detector finds wrong in one call of a broken op."""
    with dispatch.override(op, broken), OpDetector() as detector:
        detector.listen()
        positional = {"write_kv": ("q", "k", "v", "k_cache", "v_cache", "slot_mapping")}
        names = positional.get(op, ("q", "k_cache", "v_cache"))
        args = [inputs[name] for name in names]
        dispatch.active[op](*args, **{name: value for name, value in inputs.items() if name not in names})
        return [each.op for each in detector.stop()]


def case_with(op: str, option: str, value: Any = None) -> str:
    """Return the first case, of those that tests run, that has an option."""
    for case in load_specs()[op].cases:
        if case.tier == "test" and (case.get(option) == value if value is not None else case.get(option)):
            return case.name
    raise AssertionError(f"{op} has no case with {option}")


@pytest.mark.parametrize("op", faults.ATTENTION)
def test_a_missing_soft_cap_is_named(op: str) -> None:
    real, inputs = scene(op, case_with(op, "soft_cap"))
    assert wrong_ops(op, real, inputs) == []
    assert wrong_ops(op, lambda *args, **kwargs: real(*args, **kwargs | {"soft_cap": None}), inputs) == [op]


@pytest.mark.parametrize("op", faults.ATTENTION)
@pytest.mark.parametrize("cache", ["int8", "e4m3"])
def test_swapped_scales_are_named_where_they_are_read(op: str, cache: str) -> None:
    real, inputs = scene(op, case_with(op, "cache", cache))
    inputs["v_scale"] = inputs["v_scale"] * 2

    def swapped(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs | {"k_scale": kwargs["v_scale"], "v_scale": kwargs["k_scale"]})

    assert wrong_ops(op, real, inputs) == []
    assert wrong_ops(op, swapped, inputs) == [op]


def test_swapped_scales_are_named_where_they_are_written() -> None:
    real, _ = scene("write_kv", "e4m3")

    def swapped(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs | {"k_scale": kwargs["v_scale"], "v_scale": kwargs["k_scale"]})

    assert wrong_ops("write_kv", real, scene("write_kv", "e4m3")[1]) == []
    assert wrong_ops("write_kv", swapped, scene("write_kv", "e4m3")[1]) == ["write_kv, keys", "write_kv, values"]


@pytest.mark.parametrize("case", ["neox-float32", "neox-bfloat16", "norm", "int8", "e4m3", "partial", "interleaved"])
def test_a_right_write_passes(case: str) -> None:
    real, inputs = scene("write_kv", case)
    assert wrong_ops("write_kv", real, inputs) == []
