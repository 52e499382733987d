"""This module holds `octavo bench kernels`: ops timed alone. It does not know how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .bench_options import OpOptions
from .bench_results import Results
from .endings import FAILED, INTERRUPTED, OK, Interrupt
from .progress import GenerationBar
from .terminal import error_line, stderr

if TYPE_CHECKING:
    from ..tools.bench.checking import KernelCase
    from ..tools.bench.comparison import Difference
    from ..tools.bench.kernels import Clock, Timed
    from ..tools.bench.machine import Yardstick

__all__ = ["bench_kernels"]


class _Now:
    """What is being done, beside the bar."""

    now = ""


def bench_kernels(*, options: OpOptions, quiet: bool) -> int:
    """Time every op alone, at a real model's sizes, and report bytes and operations per second.

    A case is compared with the float64 reference first; where it is off, no figure is told and the status is 1.
    """
    words = None if options.op is None else ",".join(options.op).split(",")
    results = Results("kernels", options, ("cases",), _changes, quiet=quiet)
    from octavo.kernels import BackendError, current_backend, interpreted, use_backend

    from ..tools.bench.kernels import best_clock, kernel_cases, kernel_lines, kernel_result
    from ..tools.bench.machine import Yardstick

    cases = kernel_cases(words, options.dtype)
    try:
        if options.backend != "auto":
            use_backend(options.backend)
        backend = current_backend()
    except BackendError as error:
        raise ConfigError(str(error)) from None
    if backend == "triton" and interpreted():
        raise ConfigError("TRITON_INTERPRET=1 is set: how long the interpreter takes says nothing of the kernels")
    clock = best_clock()
    if not quiet:
        where = f"backend {backend} on {clock.device.type}, caches {clock.caches}"
        stderr().print(f"{len(cases)} cases, {options.num_rounds} rounds, {where}", style="dim")
    yardstick = Yardstick(clock.device.type)
    with Interrupt() as interrupt:
        done, failures = _time(cases, clock, yardstick, options.num_rounds, interrupt, quiet=quiet)
    figures = [kernel_result(timed) for timed in done if timed.rounds]
    if figures:
        facts = {"backend": backend, "caches": clock.caches, "yardstick_s": yardstick.seconds}
        result: dict[str, Any] = {**facts, "cases": figures}
        results.add(result, {}, clock.device.type, kernel_lines(figures))
        results.save()
    for failure in failures:
        error_line(f"{failure}; no figure is told of it")
    if interrupt.wanted:
        error_line(
            f"{sum(len(timed.rounds) for timed in done)} of {len(cases) * options.num_rounds} timings are over",
            label="interrupted: ",
        )
        return INTERRUPTED
    return FAILED if failures else OK


def _time(
    cases: Sequence[KernelCase],
    clock: Clock,
    yardstick: Yardstick,
    num_rounds: int,
    interrupt: Interrupt,
    *,
    quiet: bool,
) -> tuple[list[Timed], list[str]]:
    """Return the cases that were right, timed in turns, and what is wrong with the others."""
    from ..tools.bench import WrongResultError
    from ..tools.bench.kernels import prepare

    shown, ready, failures = _Now(), list[Any](), list[str]()
    with GenerationBar(shown, len(cases) * (1 + num_rounds), num_over=0, quiet=quiet) as bar:

        def tell(text: str, *, over: bool = False) -> None:
            shown.now = text
            if over:
                bar.over()
            bar.step()

        for one in cases:
            if interrupt.wanted:
                break
            tell(f"checking {one.name}")
            try:
                ready.append(prepare(one, clock))
            except WrongResultError as error:
                failures.append(str(error))
            except (ValueError, RuntimeError) as error:  # what a backend refuses, and memory that is not there
                failures.append(f"{one.name} cannot be run: {error}")
            tell(f"checking {one.name}", over=True)
        for turn in range(num_rounds):
            yardstick.lay()
            for timed in ready:
                if interrupt.wanted:
                    return ready, failures
                tell(f"round {turn + 1}: {timed.one.name}")
                timed.rounds.append(clock.samples(timed.call))
                tell(f"round {turn + 1}: {timed.one.name}", over=True)
    return ready, failures


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    from ..tools.bench.kernels import kernel_differences

    found, missing = kernel_differences(old["cases"], new["cases"])
    if missing:
        error_line(f"the old result lacks {', '.join(missing)}", label="")
    return found
