"""This module holds the simulator: the real core, scheduler and pool under faults. It does not know a real device.

Everything follows from a `Scenario`; nothing reads the machine's clock or its random numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from octavo.engine.config import FaultConfig
from octavo.engine.core import EngineCore
from octavo.engine.errors import RequestError
from octavo.engine.request import Request
from octavo.engine.runner.fake_runner import FakeRunner, InjectedError, reference_stream
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduler, SchedulerLimits
from octavo.engine.step import EngineOutput, ModelOutput, SchedulerOutput

from .client import Sequence, Violation, check
from .invariants import Invariants
from .ledger import Ledger
from .scenario import Scenario

__all__ = ["Failure", "Simulation", "run", "shrink"]

SALTS = ("", "a", "b")
VOCAB_SIZE = 32
EOS = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """A scenario that broke something."""

    scenario: Scenario
    step: int
    error: Exception

    @property
    def name(self) -> str:
        """The invariant, or the exception where the engine itself gave up."""
        return self.error.name if isinstance(self.error, Violation) else type(self.error).__name__

    def __str__(self) -> str:
        return f"{self.scenario.command()}\n  step {self.step}: {self.error!r}"


class _LateOutput:
    """The output of a step, to be had once and in its turn."""

    def __init__(self, runner: _WatchedRunner, output: ModelOutput, *, fails: bool) -> None:
        self._runner = runner
        self._output = output
        self._fails = fails

    def wait(self) -> ModelOutput:
        self._runner.take(self)
        if self._fails:
            raise InjectedError("told to fail after all was launched")
        return self._output


class _WatchedRunner:
    """Stands between core and runner, sees every step, and lets things happen while the device is busy."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._out: list[_LateOutput] = []

    def take(self, output: _LateOutput) -> None:
        """Take note that a step is waited for."""
        if not self._out or self._out.pop(0) is not output:
            self._simulation.broken = Violation("I7", "a step is waited for out of turn")

    def execute(self, step: SchedulerOutput) -> _LateOutput:
        try:
            return self._watch(step)
        except InjectedError:
            raise
        except Exception as error:
            # The core would take it for a fault of the device and go on.
            self._simulation.broken = error
            raise

    def _watch(self, step: SchedulerOutput) -> _LateOutput:
        simulation = self._simulation
        check("I7", len(self._out) < simulation.limits.max_steps_in_flight, "too many steps are out")
        simulation.invariants.check_work(step, simulation.oldest)
        simulation.oldest = None  # where a second step is handed out, somebody else may have become the oldest
        fails_late = simulation.inject_into(step)
        written = simulation.runner.fail_next != "before"
        try:
            output = simulation.runner.execute(step)
        finally:
            if written:
                simulation.invariants.check_writes(step)
        self._out.append(_LateOutput(self, output, fails=fails_late))
        simulation.while_in_flight()
        return self._out[-1]


class Simulation:
    """One run of one scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._rngs = {name: scenario.rng(name) for name in ("arrivals", *sorted(scenario.faults))}
        rng = scenario.rng("limits")
        slots = scenario.num_blocks * scenario.block_size
        faults = scenario.faults
        self.limits = SchedulerLimits(
            vocab_size=VOCAB_SIZE,
            max_model_len=min(slots, rng.choice((24, 48, 96))),
            max_num_seqs=scenario.max_num_seqs,
            max_num_batched_tokens=scenario.max_num_batched_tokens,
            num_blocks=scenario.num_blocks,
            block_size=scenario.block_size,
            eos_token_ids=frozenset({EOS}),
            model_id="fake",
            prefix_caching=scenario.prefix_caching,
            policy=scenario.policy,
            faults=FaultConfig(
                preempt_every=rng.randint(1, 7) if "preempt" in faults else 0, miss_prefix_cache="miss" in faults
            ),
            max_steps_in_flight=2 if scenario.overlap else 1,
        )
        self.now = 0.0
        self.ledger = Ledger(self.limits.max_steps_in_flight)
        self.scheduler = Scheduler(self.limits, lambda: self.now, self.ledger)
        self.runner = FakeRunner(
            num_blocks=scenario.num_blocks,
            block_size=scenario.block_size,
            max_num_seqs=scenario.max_num_seqs,
            max_model_len=self.limits.max_model_len,
            alphabet=scenario.alphabet,
        )
        self.core = EngineCore(self.scheduler, _WatchedRunner(self), seed=scenario.seed)
        self.sequences: dict[tuple[str, int], Sequence] = {}
        self.alive: dict[str, int] = {}
        """Request id -> sequences that have not ended."""
        self.invariants = Invariants(self.scheduler, self.runner, self.sequences, SALTS)
        self.oldest: Request | None = None
        self.broken: Exception | None = None
        """What went wrong inside a step."""
        self.step = 0
        self._num_added = 0
        self._num_failed_in_a_row = 0
        self._draining = False
        self._prefixes = [
            [rng.randrange(1, 4) for _ in range(rng.randrange(1, self.limits.max_model_len))] for _ in range(3)
        ]

    def run(self) -> int:
        """Run to the end and return the number of steps.

        Raises:
            Violation: an invariant does not hold.
        """
        scenario = self.scenario
        arrivals = scenario.rng("times")
        times = sorted(arrivals.randrange(scenario.num_steps) for _ in range(scenario.num_requests))
        while self.step < scenario.num_steps:
            while self._num_added < len(times) and times[self._num_added] <= self.step:
                self._arrive()
            self._disturb()
            self._one_step()
        self._drain()
        return self.step

    def _one_step(self) -> None:
        self.step += 1
        self.now += 0.001
        spared = self.limits.faults.preempt_every or self.invariants.held
        order = self.scheduler.running_requests()
        self.oldest = order[0] if order and not spared else None
        outputs = self.core.step()
        if self.broken is not None:
            raise self.broken
        self._hear(outputs)
        self.invariants.check_state()
        check("I13", not self.ledger.complaints, "; ".join(self.ledger.complaints[:1]))
        if self.step % 16 == 0 and not self.invariants.held:
            self.scheduler.check_integrity()

    def _drain(self) -> None:
        """Stop all faults: everything that is left must finish within a bound, and leave nothing behind."""
        self._draining = True
        self._release_pressure()
        self.limits = dataclasses.replace(self.limits, faults=FaultConfig())
        self.scheduler.limits = self.limits
        # The first in order is never preempted, runs at least one token in every step and so ends in at most so many
        # steps; then another is the first.
        unfinished = [sequence for sequence in self.sequences.values() if not sequence.finished]
        last_step = self.step + 8 + sum(len(seq.prompt) + seq.max_tokens + 2 for seq in unfinished)
        while self.core.has_unfinished:
            check("I10", self.step < last_step, f"{len(self.alive)} requests do not finish")
            self._one_step()
        self.scheduler.check_integrity()
        stats = self.scheduler.stats
        check("I3", stats.num_free_blocks == self.limits.num_blocks, f"{stats} after the drain")
        heard = sum(len(sequence.tokens) for sequence in self.sequences.values())
        check("I11", stats.num_output_tokens == heard, f"{stats.num_output_tokens} tokens counted, {heard} heard")
        check("I11", not self.alive, f"{sorted(self.alive)} never ended")
        check("I11", stats.num_running == stats.num_waiting == 0, f"{stats} after the drain")
        check("I8", not self.scheduler.kv.has_pending, "blocks are announced after the drain")
        self._check_ledger()

    def _check_ledger(self) -> None:
        """Compare what the events say of the whole run with what users heard and the scheduler counted."""
        stats, ledger, accounts = self.scheduler.stats, self.ledger, self.ledger.accounts
        check("I13", accounts.keys() == self.sequences.keys(), "the events are of other sequences")
        for key, sequence in self.sequences.items():
            account = accounts[key]
            end = account.end
            check("I13", end is not None, f"{account} never ended")
            heard, cut = len(sequence.tokens), sequence.cut()
            check("I13", account.num_sampled == heard, f"{account}: {heard} tokens were heard")
            kept = heard if cut is None or end.detail != "stop" else cut
            check("I13", end.num_tokens in (heard, kept), f"{account}: {kept} of {heard} tokens were kept")
            check("I13", account.num_admitted == account.num_preempted + (end.row >= 0), f"{account}: admissions")
        sums = {
            "num_steps": ledger.num_steps,
            "num_preemptions": sum(account.num_preempted for account in accounts.values()),
            "prefix_cache_hits": ledger.num_cached_tokens,
            "prefix_cache_queries": ledger.num_looked_up_tokens,
            "num_output_tokens": sum(account.num_sampled for account in accounts.values()),
            "num_wasted_tokens": ledger.num_wasted_tokens,
        }
        for name, value in sums.items():
            check("I13", getattr(stats, name) == value, f"{name} is {getattr(stats, name)}, by the events {value}")

    def _arrive(self) -> None:
        """Add a request: a shared prefix, an own end, perhaps the continuation of an earlier answer."""
        rng = self._rngs["arrivals"]
        request_id = f"r{self._num_added}"
        self._num_added += 1
        earlier = self.sequences.get((f"r{rng.randrange(self._num_added)}", 0))
        prefix = rng.choice(self._prefixes)
        if earlier is not None and rng.random() < 0.3:
            prefix = earlier.prompt + earlier.tokens
        prompt = prefix[: rng.randrange(len(prefix) + 1)] + [rng.randrange(1, 4) for _ in range(rng.randrange(8))]
        prompt = prompt[: self.limits.max_model_len - 1] or [1]
        max_tokens = rng.randint(1, min(40, self.limits.max_model_len - len(prompt)))
        stream = rng.random() < 0.5
        params = SamplingParams(
            n=rng.randint(1, self.scenario.max_choices),
            max_tokens=max_tokens,
            min_tokens=rng.choice((0, 0, 0, min(3, max_tokens))),
            seed=rng.randrange(3),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=[rng.randrange(self.scenario.alphabet)] if rng.random() < 0.2 else [],
            logprobs=0 if rng.random() < 0.2 else None,
            prompt_logprobs=0 if rng.random() < 0.15 else None,
            cache_salt=rng.choice(SALTS) or None,
            priority=rng.randrange(3),
        )
        pair = (rng.randrange(self.scenario.alphabet), rng.randrange(self.scenario.alphabet))
        wants_pair = rng.random() < 0.3
        self.core.add_request(request_id, prompt, params, stream=stream)
        self._expect(request_id, prompt, params, pair if stream and wants_pair else None)

    def _expect(
        self, request_id: str, prompt: list[int], params: SamplingParams, stop_pair: tuple[int, int] | None
    ) -> None:
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {EOS})
        self.alive[request_id] = params.n
        for index in range(params.n):
            self.sequences[request_id, index] = Sequence(
                request_id=request_id,
                index=index,
                arrival=self._num_added,
                priority=params.priority if self.limits.policy == "priority" else 0,
                salt=params.cache_salt or "",
                prompt=prompt,
                params=params,
                stop_token_ids=stops,
                max_tokens=params.max_tokens,
                reference=reference_stream(
                    prompt,
                    seed=params.seed,
                    index=index,
                    alphabet=self.scenario.alphabet,
                    min_tokens=params.min_tokens,
                    stop_token_ids=stops,
                ),
                stop_pair=stop_pair,
            )

    def _hear(self, outputs: Iterable[EngineOutput]) -> None:
        for output in outputs:
            sequence = self.sequences[output.request_id, output.index]
            sequence.hear(output)
            if not sequence.finished:
                keep = sequence.cut()
                if keep is None:
                    continue
                last = self.core.finish(sequence.request_id, sequence.index, keep)
                check("I11", last is not None, f"{sequence.request_id} could not be cut")
                sequence.hear_cut(last)
            self._ended(sequence)

    def _ended(self, sequence: Sequence) -> None:
        self.alive[sequence.request_id] -= 1
        if self.alive[sequence.request_id] == 0:
            del self.alive[sequence.request_id]

    def _strikes(self, fault: str, probability: float) -> bool:
        return not self._draining and fault in self.scenario.faults and self._rngs[fault].random() < probability

    def _disturb(self) -> None:
        """Let faults strike between two steps."""
        if self._strikes("abort", 0.05):
            self._abort_some("abort", 1)
        if self._strikes("storm", 0.01):
            self._abort_some("storm", len(self.alive))
        if self._strikes("shutdown", 0.004):
            for request_id in list(self.alive):
                self._abort(request_id)
            check("I11", not self.scheduler.requests, "requests are left after all were aborted")
        if self._strikes("reset", 0.02):
            self.scheduler.reset_prefix_cache()
        if self._strikes("clock", 0.02):
            self.now += self._rngs["clock"].choice((0.0, 1e3, 1e9))
        if self._strikes("duplicate", 0.1) and self.alive:
            request_id = self._rngs["duplicate"].choice(list(self.alive))
            self._refused(request_id, [1, 2], SamplingParams(max_tokens=1), "request_id")
        if self._strikes("impossible", 0.05):
            too_long = self.limits.max_model_len
            self._refused("x", [1] * too_long, SamplingParams(max_tokens=1), "prompt")
            self._refused("x", [1], SamplingParams(max_tokens=too_long), "max_tokens")
            self._refused("x", [1, VOCAB_SIZE], SamplingParams(max_tokens=1), "prompt")
        if self._strikes("pressure", 0.1):
            self._release_pressure()
            pool = self.scheduler.kv.pool
            count = self._rngs["pressure"].randrange(pool.num_free // 2 + 1)
            self.invariants.held = [pool.take() for _ in range(count)]

    def _release_pressure(self) -> None:
        self.scheduler.kv.pool.release(self.invariants.held)
        self.invariants.held = []

    def _abort_some(self, fault: str, count: int) -> None:
        # An id that was never there, and one that has ended, are no errors.
        check("I11", self.core.abort("nobody") == [], "news of nobody")
        alive = list(self.alive)
        for request_id in self._rngs[fault].sample(alive, min(count, len(alive))):
            self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        for (owner, _), sequence in self.sequences.items():
            sequence.may_abort |= owner == request_id
        self._hear(self.core.abort(request_id))
        check("I11", request_id not in self.alive, f"{request_id} goes on after it was aborted")
        check("I11", self.core.abort(request_id) == [], f"{request_id} was aborted twice")

    def _refused(self, request_id: str, prompt: list[int], params: SamplingParams, param: str) -> None:
        try:
            self.core.add_request(request_id, prompt, params)
        except RequestError as error:
            check("I11", error.param == param, f"refused for {error.param}, not {param}")
        else:
            check("I11", False, f"a request with a wrong {param} was taken")

    def inject_into(self, step: SchedulerOutput) -> bool:
        """Let the device fail in this step: all of it, or single rows; return whether nobody shall see it yet."""
        rows = step.rows.tolist()
        if self._strikes("nan", 0.05) and len(step.sampled):
            row = rows[self._rngs["nan"].choice(step.sampled.tolist())]
            self.runner.nan_rows = {row}
            self.invariants.sequence(self.scheduler.rows.request(row)).may_fail = True
        if self._strikes("raise", 0.03) and self._num_failed_in_a_row < 2:
            self._num_failed_in_a_row += 1
            self.runner.nan_rows = set()
            moments = ("before", "after", "late") if self.scenario.overlap else ("before", "after")
            when = self._rngs["raise"].choice(moments)
            for row in rows:
                self.invariants.sequence(self.scheduler.rows.request(row)).may_fail = True
            if when == "late":
                return True
            self.runner.fail_next = when
        else:
            self._num_failed_in_a_row = 0
        return False

    def while_in_flight(self) -> None:
        """Let users come and go while the device computes: its output is late for some of them."""
        if self._strikes("late", 0.1):
            self._abort_some("late", self._rngs["late"].randrange(4))
        if self._strikes("late", 0.1) and self._num_added < self.scenario.num_requests:
            self._arrive()


def run(scenario: Scenario) -> Failure | int:
    """Run a scenario; return its number of steps, or what it broke."""
    simulation = Simulation(scenario)
    try:
        return simulation.run()
    except Exception as error:
        return Failure(scenario, simulation.step, error)


def shrink(failure: Failure, max_runs: int = 200) -> Failure:
    """Return the simplest scenario found that breaks the same thing."""
    tried = 0
    while True:
        for scenario in failure.scenario.simpler():
            tried += 1
            again = run(scenario)
            if isinstance(again, Failure) and again.name == failure.name:
                failure = again
                break
            if tried >= max_runs:
                return failure
        else:
            return failure
