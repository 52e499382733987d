"""This module holds the profile of the kernels at a model's sizes: what they compile to, how much work they have, and
how long they take where they can run. It does not know how it is shown.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import octavo.kernels
import torch
from octavo.kernels.aot.calls import Settings
from octavo.kernels.aot.keys import Variant, list_variants, report_settings
from octavo.kernels.aot.report import compiler_version, make_rows
from octavo.kernels.aot.targets import GPUS, Model
from octavo.kernels.dispatch import TRITON_BLOCK_SIZES

from ...errors import ConfigError, describe
from ..bench.checking import KernelCase
from ..bench.kernels import Clock, Timed, prepare
from ..gpus import find_gpu
from ..report import Ceiling
from .cases import FULL, SMALL, op_cases
from .ceilings import describe_machine, measure_ceilings
from .history import KERNELS

__all__ = ["CARDS", "Document", "KernelProfile"]

Document = dict[str, Any]

CARDS: Final = {"sm_80": "a100", "sm_89": "4090", "sm_90": "h100", "sm_100": "b200", "sm_120": "5090"}
"""The card whose data sheet stands for a target."""
FOLLOWED: Final = ("spills", "loop_instructions")
"""Of a row: what a history follows; more of it is worse."""


class KernelProfile:
    """Everything that is found out in one run, collected in `document`.

    Args:
        name: of the model whose sizes these are.
        model: its sizes.
        targets: architectures to compile for.
        block_sizes: tokens per block; the first is also that of the calls.
        cache: how the KV cache stores what is read and written by the calls.
        only: parts of names of ops or kernels; none: all.
        clock: times the calls; on a CPU they are small and in float32: what runs there is the torch backend. None:
            nothing is timed.

    Raises:
        ConfigError: a target or size is not allowed, or nothing has such a name.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        *,
        targets: Sequence[str],
        block_sizes: Sequence[int] = (64, 16),
        cache: str = "auto",
        only: Sequence[str] = (),
        clock: Clock | None = None,
    ) -> None:
        for target in targets:
            if target not in GPUS:
                raise ConfigError(f"--target is {describe(target)}; allowed: {', '.join(GPUS)}, several with commas")
        for size in block_sizes:
            if size not in TRITON_BLOCK_SIZES:
                raise ConfigError(f"--block-size is {size}; allowed: {', '.join(map(str, TRITON_BLOCK_SIZES))}")
        is_small = clock is not None and clock.device.type == "cpu"
        self._model = dataclasses.replace(model, dtype="float32") if is_small else model
        self._shapes = SMALL if is_small else FULL
        self._name, self._compiled, self._only, self._clock = name, model, only, clock
        self._targets, self._block_sizes = targets, block_sizes
        self._settings = Settings(block_size=block_sizes[0], cache=cache)  # type: ignore[arg-type]
        self.document: Document = {
            "format": KERNELS,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "about": {
                "model": name,
                "sizes": dataclasses.asdict(self._model),
                "targets": list(targets),
                "block_sizes": list(block_sizes),
                "kv_cache_dtype": cache,
                "backend": None if clock is None else octavo.kernels.current_backend(),
                "shapes": dataclasses.asdict(self._shapes),
            },
            "versions": {"torch": str(torch.__version__), "triton": compiler_version()},
            "machine": None if clock is None else describe_machine(clock.device.type),
            "yardsticks_s": {},
            "ceilings": [dataclasses.asdict(each) for each in _data_sheets(targets, model.dtype)],
            "metrics": {},
            "calls": [],
            "rows": [],
        }
        self._describe_calls()

    def variants(self) -> list[Variant]:
        """Return what there is to compile: the same as for `python -m octavo.kernels.aot report`.

        Raises:
            ConfigError: the kernels do not take these sizes, or nothing has a name that was asked for.
        """
        if octavo.kernels.interpreted():
            raise ConfigError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing; unset it")
        settings = report_settings(self._block_sizes)
        try:
            found = [each for name in self._targets for each in list_variants(self._compiled, settings, GPUS[name])]
        except ValueError as error:  # a kernel's refusal of what it cannot do
            raise ConfigError(str(error)) from error
        chosen = [each for each in found if self._wanted(each.op, each.launch.kernel)]
        if not chosen:
            names = sorted({each.op for each in found} | {each.launch.kernel for each in found})
            raise ConfigError(f"--only is {','.join(self._only)}; allowed: parts of {', '.join(names)}")
        return chosen

    def compile(
        self, variants: Sequence[Variant], *, cache: Path, num_workers: int, advance: Callable[[], object]
    ) -> None:
        """Add a row of facts for each variant, and what a history follows of it.

        Args:
            variants: to compile, where the cache does not have them.
            cache: folder in which results are remembered.
            num_workers: processes.
            advance: called whenever one is ready.
        """
        rows = make_rows(self._name, variants, cache=cache, num_workers=num_workers, advance=advance)
        self.document["rows"] = rows
        for row in rows:
            for name in FOLLOWED:
                if row[name] is not None:
                    key = f"{row['target']} {row['kernel']}, {row['variant']}: {name.replace('_', ' ')}"
                    self.document["metrics"][key] = {"unit": "", "kind": "exact", "values": [row[name]]}

    def prepare(self) -> Iterator[Timed]:
        """Begin to time: check every call against the reference and make it ready; yields each.

        Raises:
            WrongResultError: a call computes something else than the reference.
        """
        assert self._clock is not None, "what is timed has a clock"
        ceilings, self.document["yardsticks_s"] = measure_ceilings(self._clock, getattr(torch, self._model.dtype))
        sheets = [] if self._clock.device.type == "cpu" else self.document["ceilings"]
        self.document["ceilings"] = [*map(dataclasses.asdict, ceilings), *sheets]
        for one in self._describe_calls():
            yield prepare(one, self._clock)

    def time(self, calls: Sequence[Timed]) -> Iterator[Timed]:
        """Time every call once more; yields each as it is done. As often as wanted, then `finish_times`."""
        assert self._clock is not None, "what is timed has a clock"
        for timed in calls:
            timed.rounds.append(self._clock.samples(timed.call))
            yield timed

    def finish_times(self, calls: Sequence[Timed]) -> None:
        """Add what the rounds so far say; calls without any are left as they are."""
        for facts, timed in zip(self.document["calls"], calls, strict=False):
            if not timed.rounds:
                continue
            medians = [statistics.median(seconds) for seconds in timed.rounds]
            facts["seconds"] = seconds = statistics.median(medians)
            facts["error_u"] = timed.error_u
            facts |= {f"{name}_per_s": facts[name] / seconds for name in ("bytes", "flops")}
            facts["fraction"] = facts["at_best_s"] / seconds
            self.document["metrics"][facts["name"]] = {"unit": "s", "kind": "timed", "values": medians}

    def _describe_calls(self) -> list[KernelCase]:
        """Write down how much work each call has, and return the calls."""
        cases = [one for one in op_cases(self._model, self._settings, self._shapes) if self._wanted(one.spec.name)]
        ceiling = Ceiling(**self.document["ceilings"][0])
        self.document["calls"] = []
        for one in cases:
            num_bytes, num_flops = one.spec.bytes(one.case), one.spec.flops(one.case)
            moving_s, computing_s = num_bytes / ceiling.bytes_per_s, num_flops / ceiling.flops_per_s
            facts: dict[str, Any] = {
                "op": one.spec.name,
                "name": f"{one.spec.name}, {one.case.name}",
                "bytes": num_bytes,
            }
            facts |= {"flops": num_flops, "flops_per_byte": num_flops / num_bytes}
            facts["bound_by"] = "memory" if moving_s >= computing_s else "arithmetic"
            facts["at_best_s"] = max(moving_s, computing_s)
            untimed = dict.fromkeys(("seconds", "bytes_per_s", "flops_per_s", "fraction", "error_u"))
            self.document["calls"].append(facts | untimed)
        return cases

    def _wanted(self, *names: str) -> bool:
        return not self._only or any(part in name for part in self._only for name in names)


def _data_sheets(targets: Sequence[str], dtype: str) -> list[Ceiling]:
    cards = [find_gpu(CARDS[target]) for target in targets]
    return [Ceiling(f"{card.title} ({card.source})", card.bandwidth_bytes_per_s, card.flops[dtype]) for card in cards]
