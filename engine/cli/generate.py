"""This module holds `octavo generate`: any number of prompts in one batch. It does not know tensors."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .answers import beyond_text, record_of, to_line
from .batch import Finished, run_batch
from .endings import FAILED, INTERRUPTED, OK, Interrupt
from .flags import Options
from .outputs import STDOUT, check_output, write_output
from .pretty import PrettyAnswers
from .progress import GenerationBar, Speed
from .requests import BadRequest, BatchRequest, Kind, Requests, read_lines
from .results import ResultFile
from .startup_lines import start_llm
from .terminal import error_line, stderr

if TYPE_CHECKING:
    from ..llm import LLM
    from ..observe.ring import EventRing

__all__ = ["generate"]

WINDOW_FACTOR = 4
"""Requests taken in are at most so many times `max_num_seqs`."""
MAX_ERRORS_SHOWN = 3
MAX_RECORDED_STEPS = 1 << 16
"""A recording of more has lost its beginning."""


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", show_default=False)] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: a .txt file with one per line, a .jsonl file, or - for JSONL on stdin. A line of JSONL has "
            "prompt, prompt_token_ids or messages, and may have id and any sampling parameter.",
            metavar="FILE",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write answers there as JSONL. A run that was cut off goes on where it was.", metavar="FILE"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start the output afresh.")] = False,
    recording: Annotated[
        Path | None,
        typer.Option(help="Write the schedule there, for octavo replay: no prompts, no answers.", metavar="FILE"),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat/--no-chat", help="Prompts are a user's messages, to be answered.", show_default=False),
    ] = False,
    text: Annotated[
        bool | None,
        typer.Option(
            "--text/--jsonl",
            help="How to print answers; not given: as text on a terminal unless more than text is asked for, else as "
            "JSONL.",
            show_default=False,
        ),
    ] = None,
    *,
    options: Options,
) -> int:
    """Generate text for prompts, all in one batch.

    Answers come in the order of the prompts.
    """
    as_text = _is_text(text, output, options)
    ring = None if recording is None else _ring(recording, input, output)
    with ExitStack() as stack:
        requests, total = _requests(stack, prompts or [], input, options, chat)
        # Before the model is loaded: what is wrong with the input or the output costs no time then.
        todo = iter(requests) if input is None else requests.head(input)
        results = None
        if output is not None:
            if input is not None and input.exists() and output.exists() and input.samefile(output):
                raise ConfigError(f"--output {output} is the input")
            results = ResultFile(output, _settings(options, chat), overwrite=overwrite)
            stack.callback(results.close)
            todo = _unanswered(todo, results)
            first = next(todo, None)
            if first is None:
                stderr().print(f"{output} has every answer already; --overwrite starts afresh")
                return OK
            todo = chain([first], todo)
        llm = start_llm(options.config, quiet=options.quiet, recorder=ring)
        if recording is not None and ring is not None:
            stack.callback(_write_recording, recording, llm, ring)
        if results is not None:
            results.begin(_found_settings(llm))
        return _run(llm, requests, todo, results, total, as_text=as_text, quiet=options.quiet)


def _ring(recording: Path, *others: Path | None) -> EventRing:
    """Return what keeps a run, once it is sure that it can be written down and takes the place of no other file."""
    from ..observe.ring import EventRing

    check_output("--recording", recording)
    if recording.resolve() in {other.resolve() for other in others if other is not None}:
        raise ConfigError(f"--recording {recording} is the input or the output; name another file")
    if recording == STDOUT:
        raise ConfigError("--recording -: answers go to stdout; name a file")
    return EventRing(MAX_RECORDED_STEPS)


def _write_recording(path: Path, llm: LLM, ring: EventRing) -> None:
    """Write a run down, with what its schedule depended on."""
    from ..observe.recording import dumps, schedule_facts

    limits, config, resolved = llm.engine.core.scheduler.limits, llm.engine.config, llm.engine.resolved
    sizes = ("vocab_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks", "block_size")
    facts = {name: getattr(limits, name) for name in sizes} | schedule_facts(config, overlap=resolved.overlap)
    write_output(path, dumps(ring, {"model": Path(config.model).name, **facts}).decode())


def _is_text(text: bool | None, output: Path | None, options: Options) -> bool:
    """Return whether answers are printed as text, refusing what could not be seen there."""
    wanted = beyond_text(options.sampling)
    if text and output is not None:
        raise ConfigError("--text and --output are both given; --output is always JSONL, leave one out")
    if text and wanted:
        raise ConfigError(f"--text cannot show {', '.join(wanted)}; use --jsonl")
    return output is None and not wanted and (sys.stdout.isatty() if text is None else text)


def _requests(
    stack: ExitStack, prompts: list[str], file: Path | None, options: Options, chat: bool
) -> tuple[Requests, int | None]:
    """Return the reader of all requests and their number, where it can be known."""
    if bool(prompts) == (file is not None):
        given = "both" if prompts else "neither"
        raise ConfigError(
            f"prompts as arguments or with --input: {given} given; try octavo generate 'The sky is' or "
            "octavo generate --input prompts.jsonl --output out.jsonl"
        )
    kind: Kind = "argument"
    total: int | None = len(prompts)
    lines: Iterable[bytes] = (prompt.encode(errors="surrogateescape") for prompt in prompts)
    if file is not None:
        kind = "text" if file.suffix == ".txt" else "jsonl"
        if kind == "jsonl" and file.suffix not in (".jsonl", ".ndjson") and str(file) != "-":
            raise ConfigError(f"--input {file}: allowed: a name that ends in .jsonl or .txt, or - for JSONL on stdin")
        try:
            source = sys.stdin.buffer if str(file) == "-" else stack.enter_context(file.open("rb"))
        except OSError as error:
            raise ConfigError(f"--input {file}: {error.strerror}") from None
        total = None
        if source.seekable() and source is not sys.stdin.buffer:
            total = sum(1 for line in read_lines(source) if line.strip())
            source.seek(0)
        lines = read_lines(source)
    return Requests(lines, kind, sampling=options.sampling, chat=chat, seed=options.config.seed), total


def _settings(options: Options, chat: bool) -> dict[str, Any]:
    """Return what was asked for, as far as tokens depend on it."""
    config = options.config
    names = ("tokenizer", "load_format", "generation_config", "invariant", "seed")
    return {"sampling": dict(options.sampling), "chat": chat, **{name: getattr(config, name) for name in names}}


def _found_settings(llm: LLM) -> dict[str, Any]:
    """Return the same of what the engine has found out."""
    resolved = llm.engine.resolved
    return {"model": llm.engine.fingerprint, "dtype": resolved.dtype, "backend": resolved.backend}


def _unanswered(
    requests: Iterator[BatchRequest | BadRequest], results: ResultFile
) -> Iterator[BatchRequest | BadRequest]:
    """Yield the requests that earlier runs have not answered.

    Raises:
        ConfigError: one of those answered asks for something else now.
    """
    for request in requests:
        digest = results.finished.get(request.id) if request.id is not None else None
        if digest is None or isinstance(request, BadRequest):
            yield request
        elif digest != request.digest:
            raise ConfigError(
                f"--output {results.path} has an answer to another request with id {request.id!a} than "
                f"{request.place} now asks; name another file, or start afresh with --overwrite"
            )


def _run(
    llm: LLM,
    requests: Requests,
    todo: Iterator[BatchRequest | BadRequest],
    results: ResultFile | None,
    total: int | None,
    *,
    as_text: bool,
    quiet: bool,
) -> int:
    speed = Speed(llm)
    pretty = PrettyAnswers() if as_text else None
    num_before = len(results.finished) if results is not None else 0
    bar = GenerationBar(speed, total, num_over=num_before, quiet=quiet or pretty is not None)
    errors: list[str] = []
    num_over = num_cut = 0

    def on_step() -> None:
        speed.step()
        bar.step()

    with Interrupt() as interrupt, bar:
        for finished in run_batch(
            llm,
            todo,
            window=WINDOW_FACTOR * llm.engine.resolved.max_num_seqs,
            should_stop=lambda: interrupt.wanted,
            on_step=on_step,
            on_growth=pretty.grow if pretty is not None else None,
        ):
            _write(finished, results, pretty)
            bar.over()
            num_over += 1
            num_cut += finished.output is not None and any(
                each.finish_reason == "length" for each in finished.output.outputs
            )
            if finished.error is not None:
                errors.append(finished.error)
        if pretty is not None:
            pretty.end()
    if not quiet:
        stderr().print(f"{num_over:,} finished: {speed.summary}", style="dim")
        if num_cut:
            stderr().print(f"{num_cut:,} stopped at max_tokens; --max-tokens N allows more", style="dim")
    for error in errors[:MAX_ERRORS_SHOWN]:
        error_line(error)
    if errors:
        error_line(f"{len(errors):,} of {num_over:,} requests failed", label="")
    if interrupt.wanted:
        error_line(_how_to_resume(results, num_before + num_over - len(errors)), label="interrupted: ")
        return INTERRUPTED
    if results is not None and num_before:
        results.put_in_order(requests.line_of)
    return FAILED if errors else OK


def _write(finished: Finished, results: ResultFile | None, pretty: PrettyAnswers | None) -> None:
    if pretty is not None:
        pretty.finish(finished)
        return
    record = record_of(finished)
    if results is not None:
        if isinstance(finished.request, BatchRequest):
            record["digest"] = finished.request.digest
        results.write(record)
    else:
        sys.stdout.buffer.write(to_line(record))
        sys.stdout.buffer.flush()


def _how_to_resume(results: ResultFile | None, num_kept: int) -> str:
    if results is None:
        return "nothing is kept; with --output FILE a run can be taken up again"
    command = shlex.join(["octavo", *(word for word in sys.argv[1:] if word != "--overwrite")])
    return f"{results.path} has {num_kept:,} answers; to go on:\n  {command}"
