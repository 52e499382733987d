"""This module holds `octavo bench throughput` and `octavo bench latency`: an engine of their own, measured. It does not
know how either is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .bench_options import LatencyOptions, ThroughputOptions
from .bench_results import Results, check_no_sampling, engine_facts
from .endings import INTERRUPTED, OK, Interrupt
from .flags import Options, own_options
from .progress import GenerationBar, Speed
from .startup_lines import start_llm
from .terminal import error_line

if TYPE_CHECKING:
    from ..llm import LLM
    from ..tools.bench.latency import Batch
    from ..tools.bench.machine import Yardstick
    from ..tools.bench.throughput import Round
    from ..tools.workload import LoadRequest

__all__ = ["bench_latency", "bench_throughput"]

DEFAULT_OUTPUT_LEN = 128
WARM_UP = (8, 2)
"""Prompts and tokens of each before the first round."""
_NOT_WORKLOAD = ("save_result", "compare", "num_rounds", "num_iters", "num_iters_warmup", "batch_size")
Model = Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False)]


def bench_throughput(model_name: Model = None, *, options: Options) -> int:
    """Run many prompts through an engine, all at once, and report how many it does in a second.

    Every answer has its full length, whatever the model would say. Each round begins with an empty prefix cache.
    """
    from ..tools.bench.machine import Yardstick
    from ..tools.bench.throughput import throughput_differences, throughput_lines, throughput_result

    own = own_options(ThroughputOptions, options.own)
    check_no_sampling(options.sampling)
    config = options.config_of(model_name)
    required = ("elapsed_time", "requests_per_second", "tokens_per_second")
    results = Results("throughput", own, required, throughput_differences, quiet=options.quiet)
    llm = start_llm(config, quiet=options.quiet)
    device = llm.engine.resolved.device
    yardstick = Yardstick(device)
    with Interrupt() as interrupt:
        rounds = _rounds(llm, _requests(llm, own), own, yardstick, interrupt, quiet=options.quiet)
    if rounds:
        result = engine_facts(llm) | throughput_result(rounds) | {"yardstick_s": yardstick.seconds}
        results.add(result, _workload(own), device, throughput_lines(result))
        results.save()
    if interrupt.wanted:
        return _interrupted(f"{len(rounds)} of {own.num_rounds} rounds are over")
    return OK


def _requests(llm: LLM, own: ThroughputOptions) -> list[LoadRequest]:
    from ..tools import workload

    file, length = own.dataset_path, own.output_len
    if file is None:
        return workload.random_requests(
            own.num_prompts,
            seed=own.seed,
            input_len=own.input_len,
            output_len=length or DEFAULT_OUTPUT_LEN,
            range_ratio=own.range_ratio,
            prefix_len=own.prefix_len,
            vocab_size=llm.engine.model_config.vocab_size,
        )
    if own.dataset == "jsonl":
        requests = workload.read_jsonl(file, own.num_prompts, output_len=length or DEFAULT_OUTPUT_LEN)
    else:

        async def count_tokens(text: str) -> int:
            return len(llm.encode(text))

        requests = asyncio.run(
            workload.sharegpt_requests(
                file, own.num_prompts, seed=own.seed, output_len=length, count_tokens=count_tokens
            )
        )
    if not requests:
        raise ConfigError(f"--dataset-path {file}: holds no request that fits")
    return requests


def _rounds(
    llm: LLM,
    requests: list[LoadRequest],
    own: ThroughputOptions,
    yardstick: Yardstick,
    interrupt: Interrupt,
    *,
    quiet: bool,
) -> list[Round]:
    """Return the rounds that are whole."""
    from ..tools.bench.throughput import run_round
    from ..tools.workload import LoadRequest

    params = llm.params({"temperature": own.temperature, "ignore_eos": True})
    num, length = WARM_UP
    run_round(llm, [LoadRequest(each.prompt, min(length, each.max_tokens)) for each in requests[:num]], params)
    speed = Speed(llm)
    rounds: list[Round] = []
    with GenerationBar(speed, own.num_rounds * len(requests), num_over=0, quiet=quiet) as bar:

        def on_step() -> None:
            speed.step()
            bar.step()

        while len(rounds) < own.num_rounds:
            yardstick.lay()
            found = run_round(
                llm, requests, params, should_stop=lambda: interrupt.wanted, on_step=on_step, on_over=bar.over
            )
            if found is None:
                break
            rounds.append(found)
    return rounds


def bench_latency(model_name: Model = None, *, options: Options) -> int:
    """Run one batch at a time through an engine and report how long it takes, to the first tokens and for each after.

    Every answer has its full length, whatever the model would say. Each batch begins with an empty prefix cache.
    """
    from ..tools.bench.latency import check_fits, latency_differences, latency_lines, latency_result
    from ..tools.bench.machine import Yardstick

    own = own_options(LatencyOptions, options.own)
    check_no_sampling(options.sampling)
    config, sizes = options.config_of(model_name), own.batch_sizes
    results = Results(
        "latency", own, ("avg_latency", "latencies", "percentiles"), latency_differences, quiet=options.quiet
    )
    llm = start_llm(config, quiet=options.quiet)
    for size in sizes:
        check_fits(llm, size, own.input_len + own.output_len)
    yardstick = Yardstick(llm.engine.resolved.device)
    with Interrupt() as interrupt:
        batches = _batches(llm, own, sizes, yardstick, interrupt, quiet=options.quiet)
    for size, done in batches.items():
        if done:
            workload = {"batch_size": size, **_workload(own)}
            result = engine_facts(llm) | workload | latency_result(done, output_len=own.output_len)
            result["yardstick_s"] = yardstick.seconds
            results.add(result, workload, llm.engine.resolved.device, latency_lines(result))
    results.save()
    if interrupt.wanted:
        return _interrupted(f"{sum(map(len, batches.values()))} of {own.num_iters * len(batches)} batches are over")
    return OK


class _Last:
    """What is shown of batches beside the bar."""

    now = ""


def _batches(
    llm: LLM, own: LatencyOptions, sizes: list[int], yardstick: Yardstick, interrupt: Interrupt, *, quiet: bool
) -> dict[int, list[Batch]]:
    """Return the batches of each size that are whole; sizes take turns, so that what slows one slows all."""
    from ..tools.bench.latency import run_batch
    from ..tools.workload import random_requests

    params = llm.params({"temperature": own.temperature, "ignore_eos": True, "max_tokens": own.output_len})
    drawn = random_requests(
        max(sizes),
        seed=own.seed,
        input_len=own.input_len,
        output_len=own.output_len,
        vocab_size=llm.engine.model_config.vocab_size,
    )
    prompts: list[Any] = [each.prompt for each in drawn]
    batches: dict[int, list[Batch]] = {size: [] for size in sizes}
    last, num_turns = _Last(), own.num_iters_warmup + own.num_iters
    with GenerationBar(last, num_turns * len(batches), num_over=0, quiet=quiet) as bar:
        for turn in range(num_turns):
            yardstick.lay()
            for size, done in batches.items():
                batch = run_batch(llm, prompts[:size], params, should_stop=lambda: interrupt.wanted)
                if batch is None:
                    return batches
                if turn >= own.num_iters_warmup:
                    done.append(batch)
                last.now = f"batch of {size}: {batch.end_s * 1000:,.0f} ms"
                bar.over()
                bar.step()
    return batches


def _workload(own: ThroughputOptions | LatencyOptions) -> dict[str, Any]:
    """Return what was run, as far as speed depends on it."""
    values: Mapping[str, Any] = asdict(own)
    return {
        name: None if value is None else value.name if name == "dataset_path" else value
        for name, value in values.items()
        if name not in _NOT_WORKLOAD
    }


def _interrupted(message: str) -> int:
    error_line(message, label="interrupted: ")
    return INTERRUPTED
