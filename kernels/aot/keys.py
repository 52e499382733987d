"""This module holds the set of variants that an engine can launch, from its configuration alone. It does not know how
they compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.compiled import describe_variant
from .calls import Settings, engine_calls
from .driver import Launch, recording
from .targets import Gpu, Model

__all__ = ["Variant", "list_variants", "report_settings"]


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant of a kernel, and which op's call wants it first."""

    launch: Launch
    op: str
    name: str
    """What was special about that call; with a number where one kernel has several variants of the same name."""

    def __str__(self) -> str:
        launch = self.launch
        return f"{launch.target} {launch.kernel}({describe_variant(launch.specialization)})"


def report_settings(block_sizes: Sequence[int]) -> list[Settings]:
    """Return the settings of a report, which is of every kernel: those of invariant plans and quantised caches, too."""
    special = [{"invariant": True}, {"cache": "int8"}, {"cache": "e4m3"}]
    settings = [Settings(block_size=size) for size in block_sizes]
    return settings + [Settings(block_size=block_sizes[0], **each) for each in special]  # type: ignore[arg-type]


def list_variants(model: Model, settings: Sequence[Settings], gpu: Gpu) -> list[Variant]:
    """Return every variant that engines of these settings can launch on a GPU, in the order of first use."""
    found: list[Variant] = []
    names: dict[tuple[str, str], int] = {}
    with recording(gpu) as seen:
        for call in engine_calls(model, settings):
            call.run()
            for launch in list(seen)[len(found) :]:
                count = names[launch.kernel, call.label] = names.get((launch.kernel, call.label), 0) + 1
                found.append(Variant(launch, call.op, call.label if count == 1 else f"{call.label} #{count}"))
    return found
