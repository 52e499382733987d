"""This module holds `octavo profile`: where time goes in kernels and in steps. It does not know how it is found out."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .endings import FAILED, INTERRUPTED, OK, Interrupt
from .flags import Options, own_options
from .outputs import STDOUT, write_output
from .profile_options import KernelOptions, StepOptions, integers, split_words
from .progress import GenerationBar
from .startup_lines import start_llm
from .terminal import error_line, show, stderr

if TYPE_CHECKING:
    from octavo.kernels.aot.targets import Model

    from ..tools.profile.kernels import KernelProfile

__all__ = ["profile_kernels", "profile_step"]

DEFAULT_GEOMETRY = "llama-3-8b"
DEFAULT_TARGET = "sm_90"


class _Doing:
    """What is going on, shown beside a bar."""

    now = ""


def profile_kernels(
    words: Annotated[list[str] | None, typer.Argument(metavar="MODEL", show_default=False)] = None,
    *,
    options: KernelOptions,
    quiet: bool,
) -> int:
    """Show what every kernel compiles to and how much work it has at a model's sizes; times it where it can run.

    Needs no GPU: what is read of machine code is the same everywhere. MODEL is a folder, a config.json, a .gguf
    file, a bundled name or a hub id whose sizes count; none of its weights are read.
    """
    from octavo.kernels.aot.compile import default_cache

    from ..tools.bench.kernels import best_clock
    from ..tools.profile.history import read_runs
    from ..tools.profile.kernels import KernelProfile

    model_name, history = split_words(words, options.history)
    name, model = _sizes(model_name, options.geometry)
    profile = KernelProfile(
        name,
        model,
        targets=_targets(options.target),
        block_sizes=integers("--block-size", options.block_size),
        cache=options.kv_cache,
        only=options.only.split(",") if options.only else (),
        clock=best_clock() if (_has_gpu() if options.time is None else options.time) else None,
    )
    read_runs(history, profile.document)  # before minutes go into what shall be compared with them
    if options.compile:
        variants, doing = profile.variants(), _Doing()
        doing.now = "kernels compiled, or remembered"
        with GenerationBar(doing, len(variants), num_over=0, quiet=quiet) as bar:

            def advance() -> None:
                bar.over()
                bar.step()

            profile.compile(
                variants, cache=options.cache or default_cache(), num_workers=options.workers, advance=advance
            )
    elif not profile.document["calls"]:
        raise ConfigError(f"--only is {options.only}; no op of these calls has such a name, and nothing is compiled")
    with Interrupt() as interrupt:
        if profile.document["about"]["backend"]:
            _time(profile, options.rounds, interrupt, quiet=quiet)
    return _finish(profile.document, history, options, stopped=interrupt.wanted)


def _sizes(model_name: str | None, geometry: str | None) -> tuple[str, Model]:
    """Return the sizes asked for and what to call them."""
    from octavo.kernels.aot.targets import find_model

    if model_name is not None and geometry is not None:
        raise ConfigError(f"MODEL {model_name!a} and --geometry {geometry!a} are both given; leave one out")
    if model_name is not None:
        from ..tools.profile.geometry import model_sizes

        return model_name, model_sizes(model_name)
    geometry = geometry or DEFAULT_GEOMETRY
    try:
        return geometry, find_model(geometry)
    except ValueError as error:
        raise ConfigError(f"--geometry: {error}") from None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _targets(text: str | None) -> list[str]:
    """Return the architectures to compile for: those asked for, or that of the GPU that is here."""
    import torch

    from ..tools.profile.kernels import CARDS

    if text is not None:
        return list(dict.fromkeys(text.split(",")))
    if not _has_gpu():
        return [DEFAULT_TARGET]
    major, minor = torch.cuda.get_device_capability()
    # What is compiled for sm_80 runs on sm_86, too.
    older = [known for known in CARDS if int(known.removeprefix("sm_")) <= 10 * major + minor]
    return [older[-1] if older else DEFAULT_TARGET]


def _time(profile: KernelProfile, num_rounds: int, interrupt: Interrupt, *, quiet: bool) -> None:
    """Check and time the calls in turns; rounds that are over when Ctrl-C comes count."""
    from ..tools.bench.kernels import Timed

    calls, doing = list[Timed](), _Doing()
    total = len(profile.document["calls"]) * (num_rounds + 1)
    with GenerationBar(doing, total, num_over=0, quiet=quiet) as bar:
        steps: list[Callable[[], Any]] = [lambda: profile.prepare()]
        steps += [lambda: profile.time(calls)] * num_rounds
        for number, step in enumerate(steps):
            doing.now = f"round {number} of {num_rounds}" if number else "comparing with the reference"
            for timed in step():
                if number == 0:
                    calls.append(timed)
                bar.over()
                bar.step()
            if interrupt.wanted:
                break
    profile.finish_times(calls)


def _finish(
    document: dict[str, Any], history: Sequence[Path], options: KernelOptions | StepOptions, *, stopped: bool
) -> int:
    """Show and keep what was found, beside earlier runs; return the exit status."""
    from ..tools.profile.history import KERNELS, machine_note, read_runs, trends
    from ..tools.profile.history_part import finding_lines
    from ..tools.profile.kernel_page import kernel_page
    from ..tools.profile.step_page import step_page

    runs = read_runs(history, document)
    found = trends(runs)
    if options.json is not None:
        write_output(options.json, json.dumps(document) + "\n")
    if options.html is not None:
        make = kernel_page if document["format"] == KERNELS else step_page
        write_output(options.html, make(document, found, runs))
    if options.json != STDOUT:
        _print(document)
    worse = finding_lines(found, runs)
    for line in worse:
        error_line(line, label="")
    if history and not worse:
        stderr().print(f"nothing is worse than in {', '.join(run.name for run in runs[:-1])}", style="dim")
    if history and (text := machine_note(runs)):
        stderr().print(text, style="yellow")
    if stopped:
        error_line("interrupted: what was measured before is shown", label="")
        return INTERRUPTED
    return FAILED if worse else OK


def _print(document: dict[str, Any]) -> None:
    """Show tables on stdout."""
    from octavo.kernels.aot.report import make_table

    from ..tools.profile.history import STEP
    from ..tools.profile.kernel_page import call_table
    from ..tools.profile.step_page import part_table
    from ..tools.report import text_lines

    if document["format"] == STEP:
        show("\n".join(text_lines(*part_table(document))))
        return
    if document["rows"]:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 240).print(make_table(document["rows"]))
    if document["calls"]:
        show("\n".join(["", *text_lines(*call_table(document))]))
        first = document["ceilings"][0]["name"]
        show(f"at best: as the rates of the first ceiling allow ({first}); only what has a time was measured")


def profile_step(
    words: Annotated[list[str] | None, typer.Argument(metavar="MODEL", show_default=False)] = None,
    *,
    options: Options,
) -> int:
    """Run an engine for a moment and show where the time of its steps goes.

    Prompts are random tokens, answers have full length, and every round has new prompts; times of single steps are in
    the JSON, with the work each had to do.
    """
    from ..tools.profile.history import STEP, read_runs

    own = own_options(StepOptions, options.own)
    model_name, history = split_words(words, own.history)
    sizes = integers("--batch-size", own.batch_size)
    read_runs(history, {"format": STEP, "about": {}})
    config = options.config_of(model_name)
    if options.sampling:
        raise ConfigError("[sampling] is given; what is profiled is greedy")
    if own.trace is not None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes of its stages to stderr
    llm = start_llm(config, quiet=options.quiet)
    from ..tools.profile.steps import Load, StepProfile

    profile, doing = StepProfile(llm, Load(sizes, own.input_len, own.output_len)), _Doing()
    read_runs(history, profile.document())  # before minutes go into what shall be compared with them
    rounds: list[tuple[str, Callable[[], Iterator[None]]]] = [("warming up", lambda: profile.run_round(counts=False))]
    rounds += [(f"round {i + 1} of {own.rounds}", profile.run_round) for i in range(own.rounds)]
    if own.trace is not None:
        rounds.append(("under torch's profiler", functools.partial(profile.trace, own.trace)))
    if own.proton is not None:
        rounds.append(("under Proton", functools.partial(iter, profile.proton(own.proton))))
    total = profile.num_steps * len(rounds)
    with Interrupt() as interrupt, GenerationBar(doing, total, num_over=0, quiet=options.quiet) as bar:
        for name, run in rounds:
            doing.now = name
            for _ in run():
                bar.over()
                bar.step()
            if interrupt.wanted:
                break
    if not profile.num_rounds:
        error_line("interrupted before a round was over", label="")
        return INTERRUPTED

    return _finish(profile.document(), history, own, stopped=interrupt.wanted)
