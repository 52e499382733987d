"""This module holds what every offline benchmark does with its figures: show, compare, save. It does not know what was
measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .bench_options import LatencyOptions, OpOptions, ThroughputOptions
from .outputs import write_output
from .terminal import error_line, show, stderr

if TYPE_CHECKING:
    from ..llm import LLM
    from ..tools.bench.comparison import Difference

__all__ = ["Results", "check_no_sampling", "engine_facts"]

CAPTION = """\
geometric means of rounds; intervals: Welch's t on their logarithms; what else differs between two runs they cannot
show, but for the yardstick, which is the same work every time: where it differs, the machine does"""
YARDSTICK = "yardstick, ms"
MOVED = {"higher": "longer", "lower": "less"}
Differences = Callable[[Mapping[str, Any], Mapping[str, Any]], "Sequence[Difference]"]


class Results:
    """The results of one command and those it is compared with.

    Args:
        verb: whose they are.
        options: what was asked.
        required: keys that every result has, ours or vLLM's.
        changes: old and new result -> their differences.
        quiet: no cautions.

    Raises:
        ConfigError: the old results cannot be read.
    """

    def __init__(
        self,
        verb: str,
        options: ThroughputOptions | LatencyOptions | OpOptions,
        required: Sequence[str],
        changes: Differences,
        *,
        quiet: bool,
    ) -> None:
        from ..tools.bench.comparison import check_comparable, read_saved

        self._verb = verb
        self._save_to: Path | None = options.save_result
        self._old_file: Path | None = options.compare
        self._quiet, self._changes = quiet, changes
        self._olds: list[dict[str, Any]] = []
        if options.compare is not None:
            self._olds = read_saved(options.compare, f"bench {verb}", *required)
            # Before anything is measured: what cannot be compared would end the run before it is saved.
            for old in self._olds:
                check_comparable(options.compare, old, self._differences)
        self._kept: list[dict[str, Any]] = []

    def add(
        self,
        result: dict[str, Any],
        workload: Mapping[str, Any],
        device: str,
        lines: Sequence[str],
    ) -> None:
        """Show a result, and what has changed, and keep it.

        Args:
            result: its figures.
            workload: what has to be the same for a comparison to mean anything.
            device: "cpu" or "cuda".
            lines: its table.
        """
        from ..tools.bench.comparison import difference_lines
        from ..tools.bench.machine import machine

        show("\n".join(lines))
        about = {"benchmark": self._verb, "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S")}
        result = about | {"machine": machine(device), "workload": dict(workload)} | result
        self._kept.append(result)
        if self._old_file is None:
            return
        old = next((old for old in self._olds if old.get("workload", workload) == result["workload"]), None)
        if old is None:
            there = "; ".join(_differing(each.get("workload", {}), workload) for each in self._olds)
            error_line(f"{self._old_file} has no run of this workload: {there}", label="")
            return
        found = self._differences(old, result)
        show("\n".join(difference_lines(found, CAPTION)))
        if not self._quiet:
            for line in _cautions(old, result, found):
                stderr().print(line, style="yellow")

    def _differences(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
        from ..tools.bench.comparison import of_repeats

        found = list(self._changes(old, new))
        if old.get("yardstick_s"):
            times = [[1000 * seconds for seconds in each["yardstick_s"]] for each in (old, new)]
            found.append(of_repeats(YARDSTICK, *times))
        return found

    def save(self) -> None:
        """Write what was kept, if that was asked for; one result as it is, several as a list."""
        if self._save_to is None or not self._kept:
            return
        kept = self._kept[0] if len(self._kept) == 1 else self._kept
        write_output(self._save_to, json.dumps(kept) + "\n")


def _cautions(old: Mapping[str, Any], new: Mapping[str, Any], found: Sequence[Difference]) -> list[str]:
    """Return what is to be kept in mind when two results are compared."""
    lines = []
    for name, words in (("machine", "another machine"), ("engine", "other settings")):
        if name in new and old.get(name) != new[name]:
            lines.append(
                f"measured with {words}: {_differing(old[name], new[name])}"
                if name in old
                else f"the old result does not say what {name} it was measured with"
            )
    lines += [
        f"the yardstick took {abs(each.change):.0%} {MOVED[each.verdict]}: the machine is not as it was, "
        "so the rows above may say nothing of octavo"
        for each in found
        if each.name == YARDSTICK and each.verdict in MOVED
    ]
    return lines


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return what differs between two tables, in words."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)


def engine_facts(llm: LLM) -> dict[str, Any]:
    """Return what a result should say of the engine that it was measured on."""
    names = ("dtype", "backend", "device", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks")
    config = llm.engine.config
    facts = {name: getattr(llm.engine.resolved, name) for name in names}
    return {
        "model_id": config.model,
        "engine": facts | {"prefix_caching": config.cache.prefix_caching, "invariant": config.invariant},
    }


def check_no_sampling(sampling: Mapping[str, Any]) -> None:
    """Refuse [sampling] of octavo.toml, which no flag here stands for.

    Raises:
        ConfigError: there is some.
    """
    if sampling:
        raise ConfigError(f"[sampling] holds {', '.join(sampling)}; a benchmark takes --temperature alone")
