"""This module holds `octavo bench serve`: a load on a running server and its figures. It does not know how either is
made.

It needs no model and no torch: the server may run anywhere, and be any that speaks OpenAI's protocol.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .bench_options import BenchOptions, objectives_from
from .endings import FAILED, OK
from .outputs import write_output
from .progress import GenerationBar
from .terminal import error_line, show, stderr

if TYPE_CHECKING:
    from ..tools.load import Load
    from ..tools.stream_client import Answer, StreamClient
    from ..tools.workload import LoadRequest

__all__ = ["bench_serve"]

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
BUSY_CLIENT = 0.9
"""A client that used so much of a core may be what was measured."""
LATE_MS = 50.0
"""Requests so much later than planned are not the load that was asked for."""
MANY_CACHED = 0.5
DEFAULT_OUTPUT_LEN = 128
RUN_SEED_STEP = 1_000_003
"""Between the prompts of two runs: those of the first are in the server's cache."""
RATE_WINDOW_S = 5.0
REFRESH_S = 0.2
MAX_SHOWN = 3


def bench_serve(
    more_objectives: Annotated[list[str] | None, typer.Argument(metavar="OBJECTIVE", hidden=True)] = None,
    *,
    options: BenchOptions,
    quiet: bool,
) -> int:
    """Load an OpenAI-compatible server with streamed requests and report what its users would see.

    The table and the JSON have vLLM's names. No speed is told of answers that are wrong where counts can show it.
    """
    # As in vLLM, --goodput ttft:200 tpot:50 may name several; what follows the first arrives as an argument.
    goodput = objectives_from([*(options.goodput or ()), *(more_objectives or ())])
    try:
        from ..tools.serving_comparison import read_results
        from ..tools.stream_client import StreamClient
    except ModuleNotFoundError as error:
        raise ConfigError(f"bench needs {error.name}, which comes with: pip install 'octavo[serve]'") from None
    client = StreamClient(options.base_url, api_key=options.api_key, timeout_s=options.timeout)
    olds = read_results(options.compare) if options.compare is not None else []
    return asyncio.run(_Bench(options, goodput, client, olds, quiet=quiet).run())


class _Bench:
    """All runs of one command."""

    def __init__(
        self,
        options: BenchOptions,
        goodput: Mapping[str, float],
        client: StreamClient,
        olds: Sequence[Mapping[str, Any]],
        *,
        quiet: bool,
    ) -> None:
        self._options = options
        self._goodput = goodput
        self._client = client
        self._olds = olds
        self._quiet = quiet
        self._path = PATHS[options.endpoint]
        self._fields: dict[str, Any] = options.fields | {"stream": True, "stream_options": {"include_usage": True}}

    async def run(self) -> int:
        """Run every load, show and keep what came of it; return the exit status."""
        _allow_many_connections()
        results: list[dict[str, Any]] = []
        loads = self._options.loads
        async with self._client:
            self._fields["model"] = self._options.model or await _first_model(self._client)
            for index, load in enumerate(loads):
                result = await self._run_load(await self._requests(index), load)
                if result is None:
                    break
                results.append(result)
                self._show(result)
        if self._options.save_result is not None and results:
            kept = results[0] if len(loads) == 1 else results
            write_output(self._options.save_result, json.dumps(kept) + "\n")
        is_whole = len(results) == len(loads) and not any(result["failed"] for result in results)
        return OK if is_whole else FAILED

    async def _requests(self, index: int) -> list[LoadRequest]:
        from ..tools import workload

        options = self._options
        file, seed, length = options.dataset_path, options.seed + RUN_SEED_STEP * index, options.output_len
        if file is None:
            return workload.random_requests(
                options.num_prompts,
                seed=seed,
                input_len=options.input_len,
                output_len=length or DEFAULT_OUTPUT_LEN,
                range_ratio=options.range_ratio,
                prefix_len=options.prefix_len,
            )
        if options.dataset == "jsonl":
            requests = workload.read_jsonl(file, options.num_prompts, output_len=length or DEFAULT_OUTPUT_LEN)
        else:
            requests = await workload.sharegpt_requests(
                file, options.num_prompts, seed=seed, output_len=length, count_tokens=_counter(self._client)
            )
        if not requests:
            raise ConfigError(f"--dataset-path {file}: holds no request that fits")
        return requests

    def _body(self, request: LoadRequest) -> dict[str, Any]:
        prompt: Any = request.prompt
        is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
        asked: dict[str, Any] = {"prompt": prompt}
        if self._options.endpoint == "chat":
            if not is_chat and not isinstance(prompt, str):
                raise ConfigError("a prompt of token ids cannot be sent to --endpoint chat")
            asked = {"messages": prompt if is_chat else [{"role": "user", "content": prompt}]}
        elif is_chat:
            raise ConfigError("messages cannot be sent to --endpoint completions; use --endpoint chat")
        return self._fields | asked | {"max_tokens": request.max_tokens}

    async def _run_load(self, requests: Sequence[LoadRequest], load: Load) -> dict[str, Any] | None:
        """Run one load and return its figures, or None where there are none to tell."""
        from ..tools.load import run_load
        from ..tools.serving_result import serving_result, wrong_answers

        options = self._options
        bodies = [self._body(request) for request in requests]
        await self._warm_up()
        answers: list[Answer] = []
        live = _Live(answers)
        with GenerationBar(live, len(bodies), num_over=0, quiet=self._quiet) as bar:
            showing = asyncio.create_task(live.show(bar))
            try:
                measured = await run_load(self._client, self._path, bodies, load, answers)
            finally:
                showing.cancel()
        errors = [answer.error for answer in answers if answer.error]
        for error in dict.fromkeys(errors[:MAX_SHOWN]):
            error_line(error)
        if errors:
            error_line(f"{len(errors):,} of {len(answers):,} requests failed", label="")
        wrong = wrong_answers(requests, answers, ignore_eos=options.ignore_eos)
        if wrong:
            error_line("\n".join([f"{len(wrong):,} answers are wrong, so no speed is told", *wrong[:MAX_SHOWN]]))
        if wrong or len(errors) == len(answers):
            return None
        about = {
            "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": "openai" if options.endpoint == "completions" else "openai-chat",
            "model_id": self._fields["model"],
            "dataset": options.dataset,
        }
        return about | serving_result(requests, measured, load, goodput=self._goodput)

    async def _warm_up(self) -> None:
        from ..tools.stream_client import Answer
        from ..tools.workload import LoadRequest

        for _ in range(self._options.num_warmups):
            answer = Answer()
            await self._client.stream(self._path, self._body(LoadRequest("The", 2)), answer)
            if answer.error:
                raise ConfigError(f"the first request failed: {answer.error}")

    def _show(self, result: Mapping[str, Any]) -> None:
        from ..tools.serving_comparison import comparison_lines, matching_result
        from ..tools.serving_result import table_lines

        show("\n".join(table_lines(result)))
        if self._options.compare is not None:
            old = matching_result(result, self._olds)
            if old is None:
                error_line(f"{self._options.compare} has no run of this rate and concurrency", label="")
            else:
                show("\n".join(comparison_lines(old, result)))
        if not self._quiet:
            for line in _cautions(result, self._options):
                stderr().print(line, style="yellow")


class _Live:
    """What is told of a run while it goes on."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self.now = ""

    async def show(self, bar: GenerationBar) -> None:
        """Keep a bar up to date until cancelled."""
        num_over = 0
        while True:
            self._look()
            for _ in range(sum(answer.is_over for answer in self._answers) - num_over):
                bar.over()
                num_over += 1
            bar.step()
            await asyncio.sleep(REFRESH_S)

    def _look(self) -> None:
        times = [(answer.start_s, answer.piece_times_s) for answer in self._answers]
        self._recent.append((time.monotonic(), sum(len(pieces) for _, pieces in times)))
        while len(self._recent) > 2 and self._recent[-1][0] - self._recent[1][0] > RATE_WINDOW_S:
            self._recent.popleft()
        (start_s, before), (end_s, after) = self._recent[0], self._recent[-1]
        first = [pieces[0] - start for start, pieces in times if pieces]
        parts = [f"{(after - before) / max(end_s - start_s, 1e-9):,.0f} chunks/s"]
        if first:
            parts.append(f"median TTFT {median(first) * 1000:,.0f} ms")
        if num_failed := sum(bool(answer.error) for answer in self._answers):
            parts.append(f"{num_failed:,} failed")
        self.now = "  ".join(parts)


def _cautions(result: Mapping[str, Any], options: BenchOptions) -> list[str]:
    """Return what is to be kept in mind when the figures are read."""
    lines = []
    cpu = result["client_cpu_s"] / result["duration"]
    if cpu > BUSY_CLIENT:
        lines.append(f"this client used {cpu:.0%} of a core: it may be what was measured")
    if result["client_late_p99_ms"] > LATE_MS:
        lines.append(f"1 % of the requests were sent {result['client_late_p99_ms']:.0f} ms late or later")
    cached = (result["total_cached_tokens"] or 0) / max(result["total_input_tokens"], 1)
    if options.dataset == "random" and options.prefix_len == 0 and cached > MANY_CACHED:
        lines.append(f"{cached:.0%} of the prompt tokens were in the server's cache; draw others with --seed")
    return lines


def _allow_many_connections() -> None:
    """Raise the limit of open files, often 1,024, as far as everybody may."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _first_model(client: StreamClient) -> str:
    from ..tools.stream_client import ServerError

    try:
        return str((await client.json("/v1/models"))["data"][0]["id"])
    except ServerError as error:
        raise ConfigError(
            f"{error}\nNo server there? Start one (octavo serve), or name another with --base-url"
        ) from None
    except (KeyError, IndexError, TypeError):
        raise ConfigError(f"{client.base_url}/v1/models names no model; name one with --model") from None


def _counter(client: StreamClient) -> Callable[[str], Awaitable[int]]:
    """Return a count of tokens, the server's own; where it has none, four characters are taken to be one."""
    from ..tools.stream_client import ServerError

    has_count = True

    async def count(text: str) -> int:
        nonlocal has_count
        if has_count:
            try:
                return int((await client.json("/tokenize", {"prompt": text}))["count"])
            except (ServerError, KeyError, TypeError, ValueError) as error:
                has_count = False
                stderr().print(f"/tokenize: {error}; four characters are taken to be a token", style="dim")
        return max(len(text) // 4, 1)

    return count
