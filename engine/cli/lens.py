"""This module holds `octavo lens`: what a model would say at each token after each layer. It does not know how that is
found out.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import EngineConfig
from ..errors import ConfigError, RequestError
from ..sampling_params import SamplingParams
from .answers import beyond_text
from .endings import FAILED, OK
from .flags import Options
from .lens_table import table_lines
from .outputs import STDOUT, check_output, write_output
from .parts_bar import PartsBar
from .startup_lines import start_llm
from .terminal import error_line, show, stderr

__all__ = ["lens"]

PANEL = "Lens"


def lens(
    words: Annotated[list[str] | None, typer.Argument(metavar="MODEL PROMPT", show_default=False)] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The prompt is a user's message, to be answered.", rich_help_panel=PANEL),
    ] = False,
    layers: Annotated[
        str,
        typer.Option(
            help="Layers to read, such as 0,5,10-15; 0 is the embedding, and the last one is read in any case.",
            metavar="LIST",
            rich_help_panel=PANEL,
        ),
    ] = "all",
    top: Annotated[
        int, typer.Option(help="Candidates to keep for each layer and position.", metavar="N", rich_help_panel=PANEL)
    ] = 5,
    last: Annotated[
        int,
        typer.Option(
            help="Look at so many positions at the end of the prompt; those of the output come on top.",
            metavar="N",
            rich_help_panel=PANEL,
        ),
    ] = 64,
    both: Annotated[
        bool | None,
        typer.Option(
            "--both/--one",
            help="Run the torch reference and the Triton kernels, and show where they differ; not given: both where "
            "there is a GPU. On a CPU, with TRITON_INTERPRET=1, the kernels are interpreted, which suits tiny models.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the page there.", metavar="FILE", rich_help_panel=PANEL)
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write all figures there; - is stdout, with no table.",
            metavar="FILE",
            rich_help_panel=PANEL,
        ),
    ] = None,
    *,
    options: Options,
) -> int:
    """Show what a model would say at each token if it stopped after each layer.

    The output is generated greedily, whatever the model's own sampling defaults, unless sampling parameters say
    otherwise.
    """
    config, prompt = _config_and_prompt(words or [], options)
    chosen = _layers(layers)
    hidden = (["n"] if options.sampling.get("n", 1) != 1 else []) + beyond_text(options.sampling)
    if hidden:
        raise RequestError(f"a lens cannot show {', '.join(hidden)}; use octavo generate")
    check_output("--json", json_file)
    check_output("--html", html)
    llm = start_llm(config, quiet=options.quiet)
    from ..tools.lens import lens_page, lens_record, look

    params = SamplingParams.from_mapping({"temperature": 0.0, **options.sampling})
    with PartsBar(quiet=options.quiet) as bar:
        found = look(
            llm,
            [{"role": "user", "content": prompt}] if chat else prompt,
            params,
            layers=chosen,
            top=top,
            last=last,
            both=both,
            on_progress=bar.on_progress,
        )
    record = lens_record(found)
    if json_file != STDOUT:
        _show_table(record, is_page=html is not None, quiet=options.quiet)
    if json_file is not None:
        write_output(json_file, json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    if html is not None:
        write_output(html, lens_page(record))
    if record["error"]:
        error_line(record["error"])
        return FAILED
    return OK


def _config_and_prompt(words: list[str], options: Options) -> tuple[EngineConfig, str]:
    """Return the settings and the prompt from MODEL PROMPT, or from PROMPT where --model names the model."""
    config = replace(options.config, generation_config="none")
    if len(words) == 1 and options.names_model:
        return config, words[0]
    if len(words) != 2 or options.names_model:
        named = " besides the model that is named already" if options.names_model else ""
        raise ConfigError(
            f"{len(words)} words given{named}; allowed: a model and a prompt: octavo lens smollm2-135m 'The sky is'"
        )
    return replace(config, model=words[0]), words[1]


def _layers(text: str) -> list[int] | None:
    """Return the layers that a list such as 0,5,10-15 names; None: all."""
    if text == "all":
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"--layers is {text[:40]!a}; allowed: all, or numbers and ranges such as 0,5,10-15")
        start, stop = int(first), int(last or first)
        if not start <= stop < 2**16:
            raise ConfigError(f"--layers holds {part.strip()[:40]!a}; allowed: ranges that ascend")
        found += range(start, stop + 1)
    return found


def _show_table(record: dict[str, Any], *, is_page: bool, quiet: bool) -> None:
    from rich.console import Console

    lines, num_shown = table_lines(record, Console().width if sys.stdout.isatty() else 120)
    show("\n".join(lines))
    if quiet:
        return
    num_read, num_all = len(record["positions"]), record["positions"][-1] + 1
    notes = [] if num_shown == num_read else [f"the last {num_shown} of {num_read} positions read"]
    if num_read < num_all:
        notes.append(f"{num_read} of {num_all} positions read (--last {record['num_prompt_tokens']} for all)")
    if record["why_alone"]:
        notes.append(f"only {record['paths'][0]['backend']} ran: {record['why_alone']}")
    if not is_page:
        notes.append("--html lens.html shows everything")
    stderr().print(" · ".join(notes), style="dim")
