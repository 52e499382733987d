"""This module holds what one simulated run is made of, drawn from a seed. It does not know how it is run.

Every aspect has a random stream of its own, so that leaving out one fault, or half of the requests, leaves the rest
of a scenario as it was: that is what makes a failure shrink.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random
from typing import Literal

__all__ = ["FAULTS", "Scenario"]

FAULTS = (
    "abort",
    "storm",
    "raise",
    "nan",
    "reset",
    "impossible",
    "preempt",
    "miss",
    "pressure",
    "clock",
    "duplicate",
    "shutdown",
    "late",
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run; everything else follows from these numbers."""

    seed: int
    block_size: int
    num_blocks: int
    max_num_batched_tokens: int
    max_num_seqs: int
    policy: Literal["fcfs", "priority"]
    prefix_caching: bool
    num_requests: int
    max_choices: int
    alphabet: int
    num_steps: int
    """Steps with arrivals and faults, before the drain."""
    faults: frozenset[str]
    overlap: bool = False
    """Whether a step is scheduled while the one before it runs."""

    @classmethod
    def from_seed(cls, seed: int) -> Scenario:
        """Draw a scenario; each fault is armed with probability a quarter."""
        rng = Random(f"{seed}/scenario")
        budget = rng.choice((8, 16, 32, 64, 256)) + rng.randrange(8)
        return cls(
            seed=seed,
            block_size=rng.choice((1, 2, 3, 4, 4, 5, 8, 8, 16)),
            num_blocks=rng.choice((8, 12, 16, 24, 32, 48, 64, 128)),
            max_num_batched_tokens=budget,
            max_num_seqs=min(budget, rng.choice((2, 3, 4, 8, 16, 64))),
            policy=rng.choice(("fcfs", "fcfs", "priority")),
            prefix_caching=rng.random() < 0.9,
            num_requests=rng.randint(20, 120),
            max_choices=rng.choice((1, 2, 3)),
            alphabet=rng.choice((2, 4, 16)),
            num_steps=rng.choice((100, 200, 300)),
            faults=frozenset(fault for fault in FAULTS if rng.random() < 0.25),
        )

    def rng(self, aspect: str) -> Random:
        """Return the random stream of one aspect, from its start."""
        return Random(f"{self.seed}/{aspect}")

    def simpler(self) -> list[Scenario]:
        """Return scenarios that are one step simpler, boldest first."""
        changes: list[dict[str, object]] = [{"faults": self.faults - {fault}} for fault in sorted(self.faults)]
        for name, least in (("num_requests", 1), ("num_steps", 10), ("max_choices", 1), ("max_num_seqs", 1)):
            value = getattr(self, name)
            changes += [{name: less} for less in (value // 2, value - 1) if least <= less < value]
        if self.policy != "fcfs":
            changes.append({"policy": "fcfs"})
        return [self.replace(**change) for change in changes]

    def replace(self, **changes: object) -> Scenario:
        """Return a copy with some fields changed."""
        return Scenario(**{field.name: getattr(self, field.name) for field in fields(self)} | changes)

    def command(self) -> str:
        """Return the command that runs this scenario again."""
        drawn = Scenario.from_seed(self.seed)
        words = ["python -m tests.simulation", f"--seed {self.seed}"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != getattr(drawn, field.name):
                text = ",".join(sorted(value)) if isinstance(value, frozenset) else str(value)
                words.append(f"--set {field.name}={text}")
        return " ".join(words)

    def with_settings(self, settings: list[str]) -> Scenario:
        """Return a copy changed by `name=value` words, as `command` prints them."""
        changes: dict[str, object] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            now = getattr(self, name)
            if isinstance(now, frozenset):
                changes[name] = frozenset(filter(None, text.split(",")))
            else:
                changes[name] = text == "True" if isinstance(now, bool) else type(now)(text)
        return self.replace(**changes)
