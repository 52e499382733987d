"""This module holds the replay itself: the real scheduler and block pool, fed with what was recorded, over a model of
which every token is the name of a block. It does not know files.

Tokens matter to a schedule in one way: blocks of equal content are shared. So a token is the name of the block it is
in, the same for all sequences that had this block in common when they were recorded, and a new one everywhere else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...events import OWES_LOGPROBS, EventKind, Moment, RequestEvent, StepEvent
from ...request import Request
from ...sampling_params import SamplingParams
from ...scheduler import Scheduler
from ...scheduler.block_hash import block_digest, root_digest
from ...scheduler.block_pool import CachedBlock
from ...step import FinishReason, LogprobEntry, ModelOutput, SchedulerOutput
from .difference import Difference, first_difference
from .script import Facts, Node, Owners, Script, ScriptStep, facts_of

__all__ = ["Outcome", "StepLog", "replay"]

_PARAMS = SamplingParams()
_PARAMS_OWING = SamplingParams(prompt_logprobs=0)
_NO_ENTRY = LogprobEntry(0.0, 1, [], [])


class StepLog(NamedTuple):
    """What the scheduler said in one replayed step, in order; `step` may be missing where it raised."""

    events: list[RequestEvent]
    step: StepEvent | None
    ends: list[RequestEvent]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a replay went."""

    num_steps: int
    """Steps that were the same."""
    difference: Difference | None
    logs: list[StepLog]
    """Of the steps that were run, if they were asked for."""


def replay(script: Script, *, on_step: Callable[[], None] | None = None, keep_logs: bool = False) -> Outcome:
    """Run a script up to its end or the first difference.

    Args:
        script: what was recorded.
        on_step: called after each step; what it raises goes through.
        keep_logs: return what the scheduler said, too.
    """
    engine = _Engine(script)
    logs: list[StepLog] = []
    for place, step in enumerate(script.steps):
        here = engine.run(place)
        if keep_logs:
            logs.append(engine.log)
        if on_step is not None:
            on_step()
        difference = first_difference(place, step.facts, here)
        if difference is not None:
            return Outcome(place, difference, logs)
    return Outcome(len(script.steps), None, logs)


class _Engine:
    """A scheduler, its recorder and its model, all in one place."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._now_s = script.steps[0].event.start_s
        self._names: dict[Node, int] = {}
        self._owners = Owners()
        self._requests: dict[int, Request] = {}
        self.log = StepLog([], None, [])
        limits = script.limits
        num_tokens = sum(len(step.event.sampled) for step in script.steps)
        num_blocks = sum(event.num_tokens // limits.block_size + 2 for event in script.arrivals.values())
        # A name for every block that can become full, and 0 for none.
        limits = replace(limits, vocab_size=1 + num_tokens + num_blocks + limits.num_blocks)
        self._scheduler = Scheduler(limits, lambda: self._now_s, self)
        self._block_size = limits.block_size
        self._out: deque[tuple[SchedulerOutput, Owners]] = deque()
        """Steps that are out, with who had which row when they were handed out."""
        self._scheduled: list[RequestEvent] = []
        """What happened as steps were scheduled that are not over."""
        self._current: npt.NDArray[np.int32] = np.zeros(limits.max_num_seqs, dtype=np.int32)
        """By row: the name of the block in which its next token is; 0: not looked up yet."""
        if script.previous is not None:
            # Step numbers matter where a fault strikes every so many of them.
            self._scheduler._num_steps = script.previous.step + 1
            if not script.steps[0].event.num_cache_resets:
                self._fill_cache(script.previous.num_cached_blocks)

    def on_request(self, event: RequestEvent) -> None:
        """Take an event of the scheduler."""
        if event.kind == EventKind.ARRIVED:
            event = event._replace(serial=self._owners.alive[event.request_id, event.choice])
        known = self._owners.known(event)
        assert known is not None, f"{event} is of nobody"
        if event.kind not in (EventKind.ARRIVED, EventKind.FINISHED):
            self._scheduled.append(known)
        (self.log.events if self.log.step is None else self.log.ends).append(known)

    def on_step(self, event: StepEvent) -> None:
        """Take a step of the scheduler."""
        self.log = self.log._replace(step=event)

    def run(self, place: int) -> Facts:
        """Hand out steps as the engine does, take back the one at `place` and return what it did."""
        self.log = StepLog([], None, [])
        step, error = self._script.steps[place], ""
        if step.event.num_cache_resets:
            self._scheduler.reset_prefix_cache()
        try:
            self._hand_out(place)
        except Exception as raised:
            return {"error": repr(raised)}
        owners, number = self._owners, -1
        if self._out:
            work, owners = self._out.popleft()
            number = work.step
            self._now_s = max(self._now_s, step.event.update_s)
            try:
                if step.event.failed:
                    self._scheduler.fail(work, step.event.failed)
                else:
                    self._scheduler.update(work, self._output(work, step.ends, owners))
            except Exception as raised:
                error = repr(raised)
        event = self.log.step
        scheduled = [each for each in self._scheduled if each.step <= number or number < 0]
        self._scheduled = self._scheduled[len(scheduled) :]
        ends = [each for each in self.log.ends if each.moment == Moment.UPDATE]
        facts = facts_of(event, scheduled, ends, owners)
        return facts | ({"error": error} if error else {})

    def _hand_out(self, place: int) -> None:
        """Do what `EngineCore.step` does before it waits for the step at `place`; feed what came meanwhile."""
        steps, out, step = self._script.steps, self._out, self._script.steps[place]
        coming = (step.before, step.flight, step.flights)
        num_fed = len(out)
        self._feed(coming[num_fed])
        while len(out) < self._scheduler.limits.max_steps_in_flight:
            after = steps[place + len(out) : place + len(out) + 1]
            if out and _was_never_run(steps[place + len(out) - 1], *after):
                break
            if after:
                self._now_s = max(self._now_s, after[0].event.start_s)
            work = self._scheduler.schedule()
            if work is None:
                break
            owners = Owners()
            owners.rows = self._owners.rows.copy()
            out.append((work, owners))
            self._feed(coming[len(out)])

    def _feed(self, events: list[RequestEvent]) -> None:
        """Let requests come and go as they did."""
        for (kind, request_id), group in groupby(events, lambda event: (event.kind, event.request_id)):
            if kind == EventKind.ARRIVED:
                self._add(list(group))
                continue
            for event in group:
                if event.detail == FinishReason.ABORT:
                    self._scheduler.abort(request_id)
                else:
                    self._scheduler.finish(request_id, event.choice, event.num_tokens)

    def _add(self, events: list[RequestEvent]) -> None:
        requests = []
        for event in events:
            self._owners.alive[event.request_id, event.choice] = event.serial
            num_tokens, size = event.num_tokens, self._block_size
            names = [self._name(event.serial, block) for block in range(-(-num_tokens // size))]
            self._requests[event.serial] = Request(
                request_id=event.request_id,
                index=event.choice,
                token_ids=np.repeat(np.array(names, dtype=np.int32), size)[:num_tokens],
                num_prompt_tokens=num_tokens,
                max_num_tokens=num_tokens + event.max_tokens,
                params=_PARAMS_OWING if event.detail == OWES_LOGPROBS else _PARAMS,
                seed=0,
                priority=event.priority,
                arrival=events[0].serial,
            )
            requests.append(self._requests[event.serial])
        self._scheduler.add(requests)

    def _name(self, serial: int, block: int) -> int:
        return self._names.setdefault(self._script.node(serial, block), len(self._names) + 1)

    def _output(self, work: SchedulerOutput, ends: list[RequestEvent], owners: Owners) -> ModelOutput:
        """Return the tokens of a step, and end those sequences whose tokens or failures ended them."""
        table, rows, left = self._scheduler.rows, work.rows[work.sampled], self._scheduler.flights.left(work)
        positions = table.num_tokens[rows]
        self._current[[new.row for new in work.new_sequences]] = 0
        for place in np.flatnonzero((positions % self._block_size == 0) | (self._current[rows] == 0)).tolist():
            row = int(rows[place])
            if row not in left:
                self._current[row] = self._name(owners.rows[row], int(positions[place]) // self._block_size)
        failed, ended = np.zeros(len(rows), dtype=np.bool_), np.zeros(len(rows), dtype=np.bool_)
        serials = {owners.rows[int(row)]: place for place, row in enumerate(rows)}
        for event in ends:
            if event.serial in serials and event.detail in (FinishReason.ERROR, FinishReason.STOP):
                (failed if event.detail == FinishReason.ERROR else ended)[serials[event.serial]] = True
        return ModelOutput(
            self._current[rows],
            failed=failed if failed.any() else None,
            ended=ended if ended.any() else None,
            prompt_logprobs=self._prompt_logprobs(work, left),
        )

    def _prompt_logprobs(self, work: SchedulerOutput, left: Collection[int]) -> dict[int, list[LogprobEntry]]:
        """Return as many entries as a model would have, for those who wait for them before they look at the cache."""
        found = {}
        for row, start, count in zip(
            *(each.tolist() for each in (work.rows, work.num_computed_tokens, work.num_scheduled_tokens)), strict=True
        ):
            if row not in left and (request := self._scheduler.rows.request(row)).owes_prompt_logprobs:
                num_entries = min(start + count, request.num_prompt_tokens - 1) - start
                found[row] = [_NO_ENTRY] * max(0, num_entries)
        return found

    def _fill_cache(self, num_cached: int) -> None:
        """Put into the cache what was there when the script begins, as far as it was found later.

        What a sequence found at its first admission of the blocks of somebody from before the script was there. The
        others are nobody's any more: they stand in line to be lost before those, as they were lost or never asked for.
        """
        pool, limits = self._scheduler.kv.pool, self._scheduler.limits
        found: dict[bytes, CachedBlock] = {}
        seen: set[Node] = set()
        size = limits.block_size
        for event in (
            each for step in self._script.steps for each in step.scheduled if each.kind == EventKind.ADMITTED
        ):
            if self._script.arrivals[event.serial].detail == OWES_LOGPROBS:
                continue  # it did not look
            blocks = [self._script.node(event.serial, block) for block in range(event.num_tokens // size)]
            num_found = event.num_cached_tokens // size
            # The block of the last token is not looked up: most likely it was there where all before it were.
            num_found += num_found == (event.num_tokens - 1) // size
            chain = [root_digest(limits.model_id, "")]
            for block, node in enumerate(blocks):
                if node[0] in self._script.arrivals:
                    break
                data = np.full(size, self._name(event.serial, block), dtype=np.int32).tobytes()
                chain.append(block_digest(chain[-1], data))
                if node not in seen and block < num_found:
                    found[chain[-1]] = CachedBlock(chain[-1], chain[-2], data)
                seen.add(node)
        entries = [CachedBlock(b"%d" % i, b"", b"") for i in range(num_cached - len(found))]
        taken = []
        for entry in [*entries, *reversed(found.values())][: pool.num_free]:
            taken.append(pool.take())
            pool.cache(taken[-1], entry)
        pool.release(taken)


def _was_never_run(step: ScriptStep, after: ScriptStep | None = None) -> bool:
    """Whether a step failed before the runner had it, so that none was scheduled before it had come back."""
    return bool(step.event.failed) and (after is None or after.event.start_s > step.event.end_s)
