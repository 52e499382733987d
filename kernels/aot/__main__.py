"""This module holds the command line of the ahead-of-time tools. It does not know what is in a report."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress

from ..dispatch import interpreted
from .budget import BUDGET, broken, updated
from .calls import Settings, missing_ops
from .compile import default_cache
from .keys import Variant, list_variants, report_settings
from .report import Row, make_page, make_rows, make_table, write_json
from .targets import BUDGETED, GPUS, MODELS, find_model

app = typer.Typer(add_completion=False, no_args_is_help=True, help="What the kernels compile to, found without a GPU.")
notes = Console(stderr=True)

BLOCK_SIZES = "64,16"
TARGETS = ",".join(BUDGETED)
CACHE = default_cache()

ModelOption = Annotated[str, typer.Option("--model", help=f"{', '.join(MODELS)}, or field=value,... of its sizes.")]
TargetOption = Annotated[str, typer.Option("--target", help=f"Of {','.join(GPUS)}, several with commas.")]
KernelOption = Annotated[
    str, typer.Option("--kernel", help="Only kernels whose names contain this, or one of these with commas.")
]
BlockOption = Annotated[str, typer.Option("--block-size", help="Tokens per block, several with commas.")]
CacheOption = Annotated[Path, typer.Option("--cache", help="Where compiled results are remembered.")]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Processes that compile.")]


def refuse(message: str) -> NoReturn:
    """End with an error of the user's."""
    notes.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def choose(model: str, targets: str, block_sizes: str, kernel: str, **flags: object) -> list[Variant]:
    """Return the variants asked for, or refuse."""
    if interpreted():
        refuse("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    unknown = [target for target in targets.split(",") if target not in GPUS]
    if unknown:
        refuse(f"unknown target {', '.join(unknown)}; known: {', '.join(GPUS)}")
    if not all(size.isdecimal() for size in block_sizes.split(",")):
        refuse(f"block_size is {block_sizes!r}; allowed: integers, several with commas")
    try:
        sizes = find_model(model)
        numbers = [int(size) for size in block_sizes.split(",")]
        settings = [Settings(block_size=size, **flags) for size in numbers] if flags else report_settings(numbers)  # type: ignore[arg-type]
        found = [variant for target in targets.split(",") for variant in list_variants(sizes, settings, GPUS[target])]
    except ValueError as error:  # a kernel's refusal of what it cannot do is one, too
        refuse(str(error))
    names, parts = sorted({variant.launch.kernel for variant in found}), kernel.split(",")
    if strange := [part for part in parts if not any(part in name for name in names)]:
        refuse(f"unknown kernel {', '.join(strange)}; known: {', '.join(names)}")
    if missing := missing_ops():
        notes.print(f"no kernel yet: {', '.join(missing)}", style="yellow")
    return [variant for variant in found if any(part in variant.launch.kernel for part in parts)]


def check_folder(path: Path | None) -> None:
    """Refuse a file in a folder that is not there, before minutes have gone into what it shall hold."""
    if path is not None and not path.parent.is_dir():
        refuse(f"{path} cannot be written: there is no folder {path.parent}")


def compile_rows(model: str, variants: Sequence[Variant], cache: Path, workers: int) -> list[Row]:
    """Compile with a progress bar on stderr."""
    with Progress(console=notes, transient=True) as progress:
        task = progress.add_task("compiling", total=len(variants))
        advance = functools.partial(progress.advance, task)
        return make_rows(model, variants, cache=cache, num_workers=workers, advance=advance)


@app.command()
def keys(
    model: ModelOption = "llama-3-8b",
    target: TargetOption = "sm_90",
    kernel: KernelOption = "",
    block_size: BlockOption = "64",
    cache_dtype: Annotated[str, typer.Option(help="auto, int8 or e4m3.")] = "auto",
    max_num_batched_tokens: int = 8192,
    max_num_seqs: int = 256,
    max_model_len: int = 32_768,
    invariant: bool = False,
) -> None:
    """List the variants that an engine can launch, compiling nothing."""
    variants = choose(
        model, target, block_size, kernel, cache=cache_dtype, max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs, max_model_len=max_model_len, invariant=invariant,
    )  # fmt: skip
    for variant in variants:
        print(variant)
    notes.print(f"{len(variants)} variants")


@app.command()
def report(
    model: ModelOption = "llama-3-8b",
    target: TargetOption = TARGETS,
    kernel: KernelOption = "",
    block_size: BlockOption = BLOCK_SIZES,
    json: Annotated[Path | None, typer.Option(help="Also write the rows as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page.")] = None,
    cache: CacheOption = CACHE,
    workers: WorkersOption = 2,
) -> None:
    """Compile every variant that an engine would launch and print what its machine code says."""
    check_folder(json)
    check_folder(html)
    rows = compile_rows(model, choose(model, target, block_size, kernel), cache, workers)
    if json is not None:
        write_json(rows, json)
    if html is not None:
        html.write_text(make_page(rows), encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 240).print(make_table(rows))


@app.command()
def check(
    model: ModelOption = "llama-3-8b",
    target: TargetOption = TARGETS,
    kernel: KernelOption = "",
    block_size: BlockOption = BLOCK_SIZES,
    update: Annotated[bool, typer.Option(help="Write what is measured, plus a margin, as the new ceilings.")] = False,
    budget: Annotated[Path, typer.Option(help="The ceilings.")] = BUDGET,
    cache: CacheOption = CACHE,
    workers: WorkersOption = 2,
) -> None:
    """Compare what variants compile to with the ceilings; name each that is broken and exit with 1."""
    if not budget.is_file():
        refuse(f"{budget} is no file; allowed: ceilings as in {BUDGET.name}")
    rows = compile_rows(model, choose(model, target, block_size, kernel), cache, workers)
    complete = not kernel and block_size == BLOCK_SIZES
    if update:
        text = updated(budget.read_text(encoding="utf-8"), rows, complete=complete)
        budget.write_text(text, encoding="utf-8")
        notes.print(f"{len(rows)} variants written to {budget}")
    findings = broken(budget.read_text(encoding="utf-8"), rows, complete=complete)
    for finding in findings:
        print(finding)
    notes.print(f"{len(rows)} variants, {len(findings)} ceilings broken")
    if findings:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
