"""This module holds where the stopwatch sits in an engine: around its phases, projections and ops. It does not know
what is made of the times.

The engine is wrapped from outside, while it is looked at, so that nothing of this costs anything at other times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final

from octavo.kernels import dispatch

from ...layers.linear import Linear
from ...llm import LLM
from ...models.decoder import Decoder
from ...runner import model_runner
from ...runner.sampler import Draw
from ...step import SchedulerOutput
from .spans import Spans

__all__ = ["PARTS", "attached"]

PARTS: Final = {
    "schedule": "choose who runs",
    "gather": "rows to the device, and there to tokens, positions, slots",
    "plan": "what all layers share: metadata, plans of attention and writes",
    "norm": "norms, with the addition before",
    "qkv": "projection",
    "write_kv": "rotation and cache write",
    "attention of prompts": "prefill rows",
    "attention of decodes": "decode rows",
    "o": "projection",
    "up": "projection, with the gate",
    "activation": "of the MLP",
    "down": "projection",
    "between": "the forward pass between all these: embedding, views, Python",
    "head": "hidden states to logits",
    "sample": "logits to tokens",
    "update": "tokens to requests, blocks to the prefix cache",
    "text": "tokens to text",
    "rest": "of a step",
}
"""What a step is taken apart into, in its order; names that are missing here are ops, by their own names."""
_OPS: Final = {
    "expand_rows": "gather",
    "paged_attention_prefill": "attention of prompts",
    "paged_attention_decode": "attention of decodes",
    "plan_paged_attention": "plan",
    "plan_write_kv": "plan",
    "rms_norm": "norm",
    "layer_norm": "norm",
    "gated_activation": "activation",
    "ungated_activation": "activation",
}
_PROJECTIONS: Final = {"gate_up": "up", "lm_head": "head"}


@contextmanager
def attached(llm: LLM, spans: Spans) -> Iterator[list[SchedulerOutput]]:
    """Time the parts of every step that this engine runs until the end of the `with` statement, one after the other.

    Nothing else may run an engine in this process meanwhile.

    Yields:
        The work of the steps, growing; whoever looks may clear it.
    """
    works: list[SchedulerOutput] = []
    core = llm.engine.core
    runner, scheduler = core.runner, core.scheduler
    assert isinstance(runner, model_runner.ModelRunner), "the engine runs a model"
    schedule = scheduler.schedule

    def noted() -> SchedulerOutput | None:
        work = schedule()
        if work is not None:
            works.append(work)
        return work

    methods: list[tuple[Any, str, str]] = [
        (scheduler, "update", "update"),
        (runner, "_apply", "gather"),
        (runner._batch, "upload", "gather"),
        (runner._batch, "note", "gather"),
        (model_runner, "build_attention_metadata", "plan"),
        (runner.model, "forward", "between"),
        (runner._sampler, "prepare", "sample"),
        (runner._sampler, "launch", "sample"),
        (Draw, "wait", "sample"),
        (llm._texts, "process", "text"),
        (llm, "step", "rest"),
    ]
    with ExitStack() as stack:
        stack.enter_context(_replaced(runner, "graphs", None))  # a captured step has no parts to look at
        # Of two steps at once nobody could say which one took the time.
        stack.enter_context(_replaced(scheduler, "limits", replace(scheduler.limits, max_steps_in_flight=1)))
        stack.enter_context(_replaced(scheduler, "schedule", spans.wrap("schedule", noted)))
        for owner, name, part in methods:
            stack.enter_context(_replaced(owner, name, spans.wrap(part, getattr(owner, name))))
        names = _linears(runner.model)
        project = spans.wrap(lambda linear, x: names.get(id(linear), "between"), Linear.__call__)
        stack.enter_context(_replaced(Linear, "__call__", project))
        for op in dispatch.OPS:
            wrapped = spans.wrap(_OPS.get(op, op), dispatch.active[op])
            stack.enter_context(dispatch.override(op, wrapped))
        yield works


def _linears(decoder: Decoder) -> dict[int, str]:
    """Return what each projection is, by its identity."""
    modules = ((name.rpartition(".")[2], module) for name, module in decoder.modules())
    return {id(module): _PROJECTIONS.get(part, part) for part, module in modules if isinstance(module, Linear)}


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put a value in an attribute's place until the end of the `with` statement."""
    is_own, previous = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, previous)
        else:
            delattr(owner, name)
