"""This module holds the list of verbs and the look of their help. It does not know what they do."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from .bench import bench_serve
from .bench_kernels import bench_kernels
from .bench_offline import bench_latency, bench_throughput
from .bench_options import BenchOptions, LatencyOptions, OpOptions, ThroughputOptions
from .chat import chat
from .doctor import DoctorOptions, doctor
from .endings import WRONG_USE
from .flags import FILE_ONLY, with_fields, with_flags
from .generate import generate
from .lens import lens
from .plan import plan
from .plan_options import PlanOptions
from .profile import profile_kernels, profile_step
from .profile_options import KernelOptions, StepOptions
from .replay import ReplayOptions, replay
from .serve import serve
from .serve_options import ServeOptions
from .simulate import simulate
from .simulate_options import SimulateOptions
from .terminal import error_line
from .verify import verify
from .verify_options import VerifyOptions

__all__ = ["app"]


class GroupedCommand(TyperCommand):
    """A verb whose help never cuts a flag's name, however narrow the terminal; `rich_help_panel` names the sections."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a command line; of a setting without a flag say where it stands instead."""
        own = {param.name for param in self.params}
        for word in args[: args.index("--") if "--" in args else None]:
            name = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
            if word.startswith("--") and name in FILE_ONLY and name not in own and "config" in own:
                error_line(f"{name} has no flag; write {name} = ... in octavo.toml and give --config octavo.toml")
                raise typer.Exit(WRONG_USE)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write all sections, in the order of their first flag."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None or param.param_type_name == "argument":
                continue
            names, text = record
            name = param.opts[0].removeprefix("--")
            if param.secondary_opts == [f"--no-{name}"]:
                names = f"--[no-]{name}"
            sections.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append((names, text))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


app = typer.Typer(
    help="octavo, an LLM inference engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=GroupedCommand)(with_flags(generate))
app.command(cls=GroupedCommand)(with_flags(chat))
app.command(cls=GroupedCommand)(with_flags(lens))
app.command(cls=GroupedCommand)(with_flags(serve, ServeOptions, "Server"))
app.command(cls=GroupedCommand)(with_flags(verify, VerifyOptions, "Verification"))
app.command(cls=GroupedCommand)(with_flags(plan, PlanOptions, "Plan"))
app.command(cls=GroupedCommand)(with_flags(simulate, SimulateOptions, "Simulation"))
app.command(cls=GroupedCommand)(with_fields(replay, ReplayOptions))
app.command(cls=GroupedCommand)(with_fields(doctor, DoctorOptions))

_bench = typer.Typer(help="Measure a server, an engine, or single ops.", no_args_is_help=True, rich_markup_mode=None)
_bench.command("serve", cls=GroupedCommand)(with_fields(bench_serve, BenchOptions))
_bench.command("throughput", cls=GroupedCommand)(with_flags(bench_throughput, ThroughputOptions, "Workload"))
_bench.command("latency", cls=GroupedCommand)(with_flags(bench_latency, LatencyOptions, "Workload"))
_bench.command("kernels", cls=GroupedCommand)(with_fields(bench_kernels, OpOptions))
app.add_typer(_bench, name="bench")

_profile = typer.Typer(help="Show where time goes.", no_args_is_help=True, rich_markup_mode=None)
_profile.command("kernels", cls=GroupedCommand)(with_fields(profile_kernels, KernelOptions))
_profile.command("step", cls=GroupedCommand)(with_flags(profile_step, StepOptions, "What to run"))
app.add_typer(_profile, name="profile")


@app.callback()
def _root() -> None:
    """Keep the verbs verbs, even where there is only one."""
