"""This module holds recordings of simulated runs, with every fault that a recording can tell of. It does not know what
is done with them.
"""

from __future__ import annotations

from typing import Any

from octavo.engine.events import Recorder, RequestEvent, StepEvent
from octavo.engine.observe import recording
from octavo.engine.observe.ring import EventRing
from octavo.engine.scheduler import SchedulerLimits
from octavo.engine.tools.replay import Script

from ...simulation.scenario import Scenario
from ...simulation.simulator import Simulation

SIZES = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks", "block_size")


class Tee:
    def __init__(self, *recorders: Recorder) -> None:
        self.recorders = recorders

    def on_request(self, event: RequestEvent) -> None:
        for recorder in self.recorders:
            recorder.on_request(event)

    def on_step(self, event: StepEvent) -> None:
        for recorder in self.recorders:
            recorder.on_step(event)


def facts_of_limits(limits: SchedulerLimits) -> dict[str, Any]:
    faults = limits.faults
    own = {"prefix_caching": limits.prefix_caching, "policy": limits.policy}
    own |= {"preempt_every": faults.preempt_every, "miss_prefix_cache": faults.miss_prefix_cache}
    own |= {"overlap": limits.max_steps_in_flight == 2}
    return {name: getattr(limits, name) for name in SIZES} | own


def simulated(scenario: Scenario, *, max_steps: int = 1 << 16) -> tuple[Simulation, bytes]:
    """Run a scenario and return it with its recording.

    Nobody records blocks that are held from outside, and limits that change in the middle of a run.
    """
    scenario = scenario.replace(faults=scenario.faults - {"pressure"})
    simulation, ring = Simulation(scenario), EventRing(max_steps, 1 << 16)
    emitter: Any = simulation.scheduler._events
    emitter._recorder = Tee(emitter._recorder, ring)
    if "preempt" in scenario.faults:
        simulation._drain = lambda: None  # type: ignore[method-assign]
    facts = facts_of_limits(simulation.limits)
    simulation.run()
    return simulation, recording.dumps(ring, facts)


def script_of(data: bytes) -> Script:
    return Script.of(recording.loads(data))
