"""This module holds `octavo verify`: an engine against a reference, token by token. It does not know how they are
compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import EngineConfig
from ..errors import ConfigError
from .endings import FAILED, OK
from .flags import Options, own_options
from .outputs import STDOUT, write_output
from .parts_bar import PartsBar
from .requests import BadRequest, BatchRequest, Requests, read_lines
from .startup_lines import start_llm
from .terminal import show
from .verify_lines import finding_lines, report_lines, verdict
from .verify_options import VerifyOptions

if TYPE_CHECKING:
    from ..llm import LLM
    from ..tools.verify import Report, Text

__all__ = ["verify"]

POOL_TOKENS = 8192
"""Of the engine's own KV pool, which nothing is run in: it sets the longest text, and leaves room for the reference."""
_FOCUS = ("--condition", "--text", "--position")


def verify(
    model_name: Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False)] = None,
    *,
    options: Options,
) -> int:
    """Compare an engine with a reference at every token of some texts, and name the first divergence.

    The same texts run under six conditions (alone, batched, decoding token by token, in chunks, preempted, from the
    prefix cache), each token forced. The exit status is 1 where something diverges: the layer, the op, the token, how
    far it is off and a command that repeats just that are printed. Schedules and KV pools are the conditions' own: of
    those settings the block size and the longest sequence count, and --max-num-seqs 1, which stores weights otherwise.
    """
    own = own_options(VerifyOptions, options.own)
    if options.sampling:
        raise ConfigError("[sampling] is given; every token is the text's own, and nothing is sampled")
    requests = None if own.prompts is None else list(_requests(own.prompts))
    llm = start_llm(_config(options.config_of(model_name)), quiet=options.quiet)
    from ..tools.verify import Focus, built_in_texts, report_record, verify_page
    from ..tools.verify import verify as run

    encode = llm.encode if llm.engine.tokenizer is not None else None
    if requests is None:
        texts = built_in_texts(encode, llm.engine.model_config.vocab_size)
    else:
        texts = [_text(llm, request) for request in requests]
    with PartsBar(quiet=options.quiet, lines=True) as bar:
        report = run(
            llm.engine,
            texts,
            against=own.against,
            cut=own.prompts is None,
            focus=Focus(own.condition, own.text, own.position),
            every_step=own.every_step,
            on_progress=bar.on_progress,
        )
    if own.json is not None:
        write_output(own.json, json.dumps(report_record(report), allow_nan=False) + "\n")
    if own.html is not None:
        write_output(own.html, verify_page(report))
    if own.json != STDOUT:
        _show(report)
    return OK if report.passed else FAILED


def _config(config: EngineConfig) -> EngineConfig:
    cache = config.cache
    if cache.kv_cache_tokens is None:
        cache = replace(cache, kv_cache_tokens=max(POOL_TOKENS, cache.block_size))
    return replace(config, cache=cache, generation_config="none")


def _requests(file: Path) -> Iterator[BatchRequest]:
    """Yield the prompts of a file; nothing else that a line may say counts.

    Raises:
        ConfigError: a line is no prompt, or there is none.
    """
    if file.suffix not in (".txt", ".jsonl", ".ndjson"):
        raise ConfigError(f"--prompts {file}: allowed: a name that ends in .txt or .jsonl")
    with file.open("rb") as lines:
        kind = "text" if file.suffix == ".txt" else "jsonl"
        requests = Requests(read_lines(lines), kind, sampling={}, chat=False, seed=0)  # type: ignore[arg-type]
        for request in requests.head(file):
            if isinstance(request, BadRequest):
                raise ConfigError(f"--prompts {file}: {request.error}")
            yield request


def _text(llm: LLM, request: BatchRequest) -> Text:
    from ..tools.verify import Text

    prompt = request.prompt
    is_chat = not isinstance(prompt, str) and not isinstance(prompt[0], int)
    name = request.id if isinstance(request.id, str) else request.place
    return Text(name, llm.chat_template.encode(prompt) if is_chat else llm.encode(prompt))  # type: ignore[arg-type]


def _show(report: Report) -> None:
    show("\n".join([*report_lines(report), ""]))
    show(verdict(report), "bold green" if report.passed else "bold red")
    if not report.passed:
        show("\n".join(finding_lines(report, _command())))


def _command() -> list[str]:
    """Return this command without what it was told to look at, or to write."""
    words, kept = iter(sys.argv[1:]), ["octavo"]
    for word in words:
        if word.partition("=")[0] in (*_FOCUS, "--html", "--json"):
            if "=" not in word:
                next(words, None)
        else:
            kept.append(word)
    return kept
