"""This module holds one condition's run with the detectors looking on. It does not know the reference's kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...models.decoder import Decoder, LayerCache
from ...step import SchedulerOutput
from .baseline import Baseline
from .comparison import LogitDifferences
from .conditions import Condition
from .forced import ForcedRun, Step, state_names
from .judge import OpRecord
from .metadata import ExpectedStep, MetadataDetector
from .ops import OpDetector
from .reference import Parameters
from .report import ORDER, ConditionResult, Detector, Finding, logits_fault
from .texts import Text

__all__ = ["WatchedRun"]

REPLAYED_ROWS = 48
"""Rows of a projection, norm or activation that are replayed while nothing is known to be wrong."""
IntArray = npt.NDArray[np.integer[Any]]


class WatchedRun:
    """Runs all texts under one condition and compares every step.

    Args:
        decoder: the engine's.
        texts: what to feed.
        condition: how the scheduler is made to cut it up.
        baseline: what is right.
        parameters: the reference's.
        records: of all ops replayed, added to.
        max_model_len, invariant: the engine's.
        like: the engine's KV cache; conditions have their own.
        stop_at: (text, position) after whose step to stop; None: run to the end.
        every_step: replay every op of every step, in all its rows; else of the first step of each kind.
        until_op: stop at the first wrong op.
        on_step: called after every step.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[Text],
        condition: Condition,
        baseline: Baseline,
        parameters: Parameters,
        records: dict[str, OpRecord],
        *,
        max_model_len: int,
        invariant: bool,
        like: Sequence[LayerCache],
        stop_at: tuple[int, int] | None = None,
        every_step: bool = False,
        until_op: bool = False,
        on_step: Callable[[int], object] = lambda _num_tokens: None,
    ) -> None:
        self._decoder = decoder
        self._texts = texts
        self._condition = condition
        self._baseline = baseline
        self._records = records
        self._stop_at = stop_at
        self._every_step = every_step
        self._until_op = until_op
        self._on_step = on_step
        self._run = ForcedRun(decoder, texts, condition, max_model_len=max_model_len, invariant=invariant, like=like)
        self._metadata = MetadataDetector(texts, condition.num_blocks, condition.block_size)
        self._ops = OpDetector(decoder, self._run.cache, parameters)
        self._expected: ExpectedStep | None = None
        self._kinds: set[tuple[bool, ...]] = set()
        self._num_replayed = 0
        self._findings: list[Finding] = []
        self._compared: list[tuple[IntArray, IntArray, IntArray, LogitDifferences]] = []
        """Of each step: texts, positions, the step's number, and the differences."""
        self._state_units = np.zeros(baseline.num_states)

    @torch.inference_mode()
    def run(self) -> ConditionResult:
        """Return what was found, the first of each detector."""
        num_steps = num_tokens = 0
        with self._ops:
            for step in self._run.steps(self._begin):
                num_steps, num_tokens = num_steps + 1, num_tokens + step.work.num_tokens
                self._end(step)
                self._on_step(step.work.num_tokens)
                if self._is_last(step):
                    break
        for name, record in self._ops.records.items():
            _add_record(self._records.setdefault(name, OpRecord()), record)
        stats = self._run.scheduler.stats
        self._judge_logits()
        texts, positions, _, logits = self._joined()
        return ConditionResult(
            name=self._condition.name,
            meaning=self._condition.meaning,
            num_steps=num_steps,
            num_tokens=num_tokens,
            num_preemptions=stats.num_preemptions,
            num_cached_tokens=stats.prefix_cache_hits,
            num_replayed_steps=self._num_replayed,
            texts=texts,
            positions=positions,
            logits=logits,
            state_units=self._state_units,
            findings=tuple(sorted(self._findings, key=lambda each: (each.step, ORDER[each.detector]))),
        )

    def _is_last(self, step: Step) -> bool:
        if self._until_op and any(each.detector == "op" for each in self._findings):
            return True
        if self._stop_at is None:
            return False
        text, position = self._stop_at
        return bool(((step.texts == text) & (step.positions == position)).any())

    def _begin(self, work: SchedulerOutput) -> None:
        self._expected = self._metadata.begin(work)
        is_chunk = work.num_computed_tokens[work.num_decodes :] > 0
        resumed = {sequence.row for sequence in work.new_sequences}
        kind = (
            work.num_decodes > 0,
            work.num_decodes < len(work.rows),
            bool(is_chunk.any()),
            any(first > 0 and row in resumed for row, first in zip(work.rows, work.num_computed_tokens, strict=True)),
        )
        if self._every_step or kind not in self._kinds:
            self._kinds.add(kind)
            self._num_replayed += 1
            sampled = (np.cumsum(work.num_scheduled_tokens) - 1)[work.sampled]
            self._ops.listen(self._expected, sampled.tolist(), None if self._every_step else REPLAYED_ROWS)

    def _end(self, step: Step) -> None:
        assert self._expected is not None, "a step begins before it ends"
        wrong_ops = self._ops.stop()
        mismatches = self._metadata.end(step, self._expected)
        if mismatches:
            found = mismatches[0]
            layer = None if found.reader == "embedding" else 0
            message = f"{found.what}, from layer 0 on: {found.message}"
            self._note("metadata", step, found.row, layer, f"{found.reader}, {found.what}", message)
        if wrong_ops:
            wrong = wrong_ops[0]
            units = (wrong.error_units, wrong.eager_units)
            self._note("op", step, wrong.row, wrong.layer, wrong.op, wrong.message, units)
        rows = np.flatnonzero(self._baseline.is_watched[step.texts])
        if len(rows):
            self._compare(step, rows)

    def _compare(self, step: Step, rows: IntArray) -> None:
        """Compare hidden states and logits of the token rows of texts that are watched."""
        texts, positions = step.texts[rows], step.positions[rows]
        index = self._baseline.index(texts, positions)
        chosen = torch.from_numpy(rows).to(step.states[0].device)
        errors = self._baseline.state_errors([state[chosen] for state in step.states], index).numpy()
        worst = np.nan_to_num(errors, nan=np.inf).max(axis=1)
        self._state_units = np.maximum(self._state_units, worst)
        wrong = ~(errors <= self._baseline.limits[:, None])
        if wrong.any():
            state = int(wrong.any(axis=1).argmax())
            at = int(wrong[state].argmax())
            eager = self._baseline.eager_units
            units = (float(errors[state, at]), None if eager is None else float(eager[state]))
            name = state_names(self._baseline.num_states - 2)[state]
            layer = int(name.split()[1]) if name.startswith("layer") else None
            message = f"{name} leaves another hidden state than the reference's"
            op = name if layer is None else "hidden state"
            self._note("layer", step, int(rows[at]), layer, op, message, units)
        differences = []
        for part in np.array_split(np.arange(len(rows)), -(-len(rows) // 256)):
            logits = self._decoder.logits(step.states[-1][chosen[torch.from_numpy(part)]])
            self._put_sampled(step, rows[part], logits)
            differences.append(self._baseline.compare_logits(logits, index[part]))
        number = np.full(len(rows), step.work.step)
        self._compared.append((texts, positions, number, LogitDifferences.join(differences)))

    def _put_sampled(self, step: Step, rows: IntArray, logits: torch.Tensor) -> None:
        """Where a token was sampled, look at the very logits that the sampler got."""
        if step.logits is not None:
            for i, row in enumerate(step.sampled_rows.tolist()):
                at = np.flatnonzero(rows == row)
                if len(at):
                    logits[int(at[0])] = step.logits[i]

    def _joined(self) -> tuple[IntArray, IntArray, IntArray, LogitDifferences]:
        if not self._compared:
            none = np.empty(0, dtype=np.int64)
            empty = np.empty(0)
            return none, none, none, LogitDifferences(*[empty] * 8)
        texts, positions, steps, parts = zip(*self._compared, strict=True)
        return (
            np.concatenate(texts),
            np.concatenate(positions),
            np.concatenate(steps),
            LogitDifferences.join(list(parts)),
        )

    def _judge_logits(self) -> None:
        texts, positions, steps, logits = self._joined()
        fault = logits_fault(logits, self._baseline.eager, self._decoder.dtype, self._baseline.max_mean_kl)
        if fault is not None:
            at, message = fault
            text, position = int(texts[at]), int(positions[at])
            self._keep("logits", int(steps[at]), None, "head", text, position, message)

    def _note(
        self,
        detector: Detector,
        step: Step,
        row: int,
        layer: int | None,
        op: str,
        message: str,
        units: tuple[float | None, float | None] = (None, None),
    ) -> None:
        """Keep a finding at a token row of a step; `units` are the error and eager's."""
        self._keep(detector, step.work.step, layer, op, int(step.texts[row]), int(step.positions[row]), message, units)

    def _keep(
        self,
        detector: Detector,
        step: int,
        layer: int | None,
        op: str,
        text: int,
        position: int,
        message: str,
        units: tuple[float | None, float | None] = (None, None),
    ) -> None:
        """Keep a finding, unless its detector has found something before: what follows is mostly its consequence."""
        if all(each.detector != detector for each in self._findings):
            margin = self._baseline.margin(text, position)
            name, condition = self._texts[text].name, self._condition.name
            self._findings.append(
                Finding(detector, condition, step, layer, op, name, position, *units, margin, message)
            )


def _add_record(total: OpRecord, part: OpRecord) -> None:
    total.num_replays += part.num_replays
    if part.worst_units >= total.worst_units:
        total.worst_units, total.eager_units = part.worst_units, part.eager_units
        total.limit_units = part.limit_units
