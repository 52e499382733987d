"""This module holds `octavo serve`: from flags to a server that answers, and what is said of it. It does not know HTTP
or tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import EngineConfig
from ..errors import ConfigError
from .endings import OK
from .flags import Options
from .log_lines import LogLines
from .serve_options import chat_template, crash_folder, limit_lines, server_settings
from .startup_lines import StartBar, startup_lines
from .terminal import printable, show, stderr

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from ..async_llm import AsyncLLM
    from ..server.settings import ServerSettings

__all__ = ["serve"]

ADDRESSES = {"page": "/", "docs": "/docs", "metrics": "/metrics"}
SNIPPET = """\
from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="{key}")
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
answer = client.chat.completions.create(model={model}, messages=messages)
print(answer.choices[0].message.content)"""


def serve(
    model_name: Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False)] = None,
    *,
    options: Options,
) -> int:
    """Serve a model over HTTP as OpenAI's API does, with a page to look at it.

    The flags under Server and every limit can also stand in octavo.toml, in [server] and [server.limits].
    """
    start_s = time.monotonic()
    try:
        from ..server.run import bind
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs {error.name}, which comes with: pip install 'octavo[serve]'") from None
    if options.own.get("limit") == ["help"]:
        show("\n".join(limit_lines()))
        return OK
    if options.sampling:
        raise ConfigError("[sampling] is given; every request says its own, and --generation-config the defaults")
    settings, template = server_settings(options.own), chat_template(options.own)
    crashes, config = crash_folder(options.own), options.config_of(model_name)
    # Before the model is loaded: a port that is taken costs no time then.
    with bind(settings) as listener, LogLines(sys.stderr, quiet=options.quiet):
        return asyncio.run(_serve(config, settings, template, crashes, listener, start_s, quiet=options.quiet))


async def _serve(
    config: EngineConfig,
    settings: ServerSettings,
    template: str | None,
    crashes: Path,
    listener: socket.socket,
    start_s: float,
    *,
    quiet: bool,
) -> int:
    from ..async_llm import AsyncLLM
    from ..server.run import run_server

    import_s = time.monotonic() - start_s
    with StartBar(quiet=quiet) as bar:
        llm = await AsyncLLM.start(
            config,
            on_phase=bar.on_phase,
            on_weights=bar.on_weights,
            chat_template=template,
            max_unread=settings.limits.unread_events,
            crash_folder=crashes,
        )
    try:
        if template is not None:
            _ = llm.chat_template  # a broken one is said now, not to the first who asks
        # As in the engine's process: a search for garbage in what stays for good would hold up every answer.
        gc.collect()
        gc.freeze()
        ready_s = time.monotonic() - start_s

        def on_ready(url: str) -> None:
            # A reader of ours that has left, or a full disk, is no reason not to serve.
            with contextlib.suppress(OSError):
                for line, style in [] if quiet else _ready_lines(llm, settings, url, import_s, ready_s):
                    stderr().print(printable(line), style=style)
            # On stdout, for programs: with --port 0 there is no other way to know.
            with contextlib.suppress(OSError):
                show(f"serving {_name(llm, settings)} at {url}")

        return await run_server(llm, settings, listener=listener, on_ready=on_ready)
    finally:
        await llm.shutdown()


def _ready_lines(
    llm: AsyncLLM, settings: ServerSettings, url: str, import_s: float, ready_s: float
) -> list[tuple[str, str]]:
    """Return where the seconds went and where everything is, each line with its style."""
    from ..startup import StartupPhase

    info = llm.info
    process_s = ready_s - import_s - sum(phase.seconds for phase in info.phases)
    phases = [
        StartupPhase("import the server", import_s, ""),
        StartupPhase("start the engine's process", process_s, f"pid {info.pid}"),
        *info.phases,
    ]
    key = "one of your keys" if settings.api_keys else "none"
    snippet = SNIPPET.format(url=url, key=key, model=json.dumps(_name(llm, settings)))
    return [
        *startup_lines(info.config, phases, info.choices, info.generation_config, ready_s),
        ("", ""),
        *((f"  {what:<8} {url}{path}", "") for what, path in ADDRESSES.items()),
        ("", ""),
        *((line, "dim") for line in snippet.splitlines()),
        ("", ""),
    ]


def _name(llm: AsyncLLM, settings: ServerSettings) -> str:
    from ..server.context import model_names

    return printable(model_names(settings, llm.info.model)[0])
