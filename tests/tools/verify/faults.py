"""This module holds faults to plant in an engine: each does one thing wrong, in one layer where it can. It does not
know how they are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from octavo.engine.layers.linear import Linear
from octavo.engine.layers.norm import Norm
from octavo.engine.models.decoder import Decoder
from octavo.engine.runner.input_batch import InputBatch, StepInputs
from octavo.engine.scheduler import Scheduler
from octavo.engine.step import SchedulerOutput
from octavo.engine.tools.verify.weights import unpacked
from octavo.kernels import dispatch

ATTENTION = ("paged_attention_prefill", "paged_attention_decode")
PLANS = ("plan", "worklist")


@contextmanager
def broken_op(
    op: str, change: Callable[[dict[str, Any]], object], *, layer: int | None = None, num_layers: int = 2
) -> Iterator[None]:
    """Change the named arguments of an op; of its calls in one layer only, counted by its own writes to the cache.

    Args:
        op: its name.
        change: changes the arguments in place; plans, which hold copies of them, are taken away first.
        layer: which; None: all.
        num_layers: of the model.
    """
    real, write = dispatch.active[op], dispatch.active["write_kv"]
    num_writes = 0

    def counted(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, **kwargs: Any) -> None:
        nonlocal num_writes
        num_writes += 1
        call = broken if op == "write_kv" else write
        call(q, k, v, k_cache, v_cache, slot_mapping=slot_mapping, **kwargs)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if layer is None or (num_writes - 1) % num_layers == layer:
            for plan in PLANS:
                kwargs.pop(plan, None)
            change(kwargs)
        return (write if op == "write_kv" else real)(*args, **kwargs)

    with ExitStack() as stack:
        if op != "write_kv":
            stack.enter_context(dispatch.override(op, broken))
        stack.enter_context(dispatch.override("write_kv", counted))
        yield


def add(name: str, number: int) -> Callable[[dict[str, Any]], object]:
    return lambda kwargs: kwargs.update({name: kwargs[name] + number})


def times(name: str, factor: float) -> Callable[[dict[str, Any]], object]:
    return lambda kwargs: kwargs.update({name: kwargs[name] * factor})


def turn_tables(kwargs: dict[str, Any]) -> None:
    """Let every sequence read the first block of another."""
    table = kwargs["block_table"].clone()
    table[:, 0] = table[:, 0].roll(1)
    kwargs["block_table"] = table


def corrupt_weight(decoder: Decoder, name: str, row: int, column: int, num_inputs: int) -> None:
    """Change one element of a projection."""
    linear = dict(decoder.modules())[name]
    assert isinstance(linear, Linear)
    weight = unpacked(linear, num_inputs, decoder.dtype, decoder.device).clone()
    weight[row, column] += 0.25
    bias = linear.bias
    linear.__dict__.update(Linear(weight).__dict__)
    linear.bias = bias


def drop_eps(decoder: Decoder, name: str) -> None:
    norm = dict(decoder.modules())[name]
    assert isinstance(norm, Norm)
    norm.eps = 0.0


def break_inputs(monkeypatch: pytest.MonkeyPatch, change: Callable[[StepInputs], StepInputs]) -> None:
    """Let the runner gather something else."""
    expand = InputBatch.expand
    monkeypatch.setattr(InputBatch, "expand", lambda self, *step: change(expand(self, *step)))


def give_foreign_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scheduler put a block into a table that holds something else than its prefix: the next one."""
    schedule = Scheduler.schedule

    def wrong(self: Scheduler) -> SchedulerOutput | None:
        work = schedule(self)
        hits = set()
        if work is not None:
            first = dict(zip(work.rows.tolist(), work.num_computed_tokens.tolist(), strict=True))
            hits = {sequence.row for sequence in work.new_sequences if first.get(sequence.row, 0) > 0}
        if work is None or not hits:
            return work
        for i, (row, column) in enumerate(zip(work.block_rows.tolist(), work.block_columns.tolist(), strict=True)):
            if row in hits and column == 0:
                work.block_ids[i] = work.block_ids[i] % self.limits.num_blocks + 1
        return work

    monkeypatch.setattr(Scheduler, "schedule", wrong)
