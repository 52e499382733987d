"""This module makes every setting and sampling parameter a flag, from their own tables. It does not know the verbs."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from ..config import CacheConfig, EngineConfig, SchedulerConfig, setting_names
from ..errors import ConfigError, RequestError
from ..sampling_params import RULES, SamplingParams
from ..strict_json import parse_json
from .endings import run_to_end
from .octavo_toml import read_octavo_toml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["FILE_ONLY", "Options", "own_options", "parameter_from_text", "with_fields", "with_flags"]

Kind = TypeVar("Kind", bound="DataclassInstance")

FILE_ONLY = ("seed", "graphs", "overlap")
"""Settings that, besides faults, only octavo.toml has: `--seed` is a request's, and a server has enough flags."""
_PARTS: Mapping[str, tuple[type, str]] = {
    "": (EngineConfig, "Model and device"),
    "cache": (CacheConfig, "KV cache"),
    "scheduler": (SchedulerConfig, "Scheduling"),
}
_SAMPLING_TYPES: Mapping[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "list[str]": list[str],
    "list[int]": list[int],
}
"""By `Rule.type`; any other type is given as JSON."""
_METAVARS: Mapping[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "FILE", list[int]: "ID", list[str]: "TEXT"}


@dataclass(frozen=True, slots=True)
class Options:
    """What flags and octavo.toml say together."""

    config: EngineConfig
    sampling: Mapping[str, Any]
    """The sampling parameters that were given, checked."""
    quiet: bool
    own: Mapping[str, Any]
    """What was given of the verb's own fields, and for a server of [server]; not checked."""
    names_model: bool
    """Whether the model was named."""

    def config_of(self, model: str | None) -> EngineConfig:
        """Return the settings with the model that a verb's argument names, if it does.

        Raises:
            ConfigError: a flag or the file names one, too.
        """
        if model is None:
            return self.config
        if self.names_model:
            named = f"{model!a}, and {self.config.model!a} with --model or --config"
            raise ConfigError(f"the model is given twice: {named}")
        return replace(self.config, model=model)


def own_options(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Return a verb's own flags, checked; what else octavo.toml holds for a server is not its business.

    Args:
        kind: the dataclass that `with_flags` was given.
        values: `Options.own`.

    Raises:
        ConfigError: a value is not allowed.
    """
    names = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def with_flags(verb: Callable[..., int], own: type | None = None, panel: str = "") -> Callable[..., None]:
    """Give a verb a flag for each of the engine's settings.

    Args:
        verb: returns an exit status. One of its parameters, `options`, gets what the flags say; the others are typer's.
        own: a dataclass of more flags, put first; see `with_fields`. None: those of sampling instead.
        panel: title of these flags in the help.
    """
    own_flags = {flag.name: flag for flag in (_sampling_flags() if own is None else _field_flags(own, panel))}
    flags = own_flags | {flag.name: flag for flag in _setting_flags()}

    def run(*, config: Path | None, quiet: bool, debug: bool, **arguments: Any) -> None:
        given = {name: value for name, value in arguments.items() if name in flags and value not in (None, [])}
        more = {name: value for name, value in arguments.items() if name not in flags}
        own_names = () if own is None else own_flags.keys()
        raise typer.Exit(
            run_to_end(lambda: verb(**more, options=_options(config, given, own_names, quiet)), debug=debug)
        )

    return _command(verb, run, [*flags.values(), *_shared_flags()])


def with_fields(verb: Callable[..., int], kind: type) -> Callable[..., None]:
    """Give a verb a flag for each field of a dataclass, whose help is the text below the field.

    Args:
        verb: returns an exit status. Two of its parameters, `options` and `quiet`, get the dataclass and whether to be
            quiet; the others are typer's.
        kind: the dataclass; every field has a default, and its own checks raise ConfigError.
    """
    flags = list(_field_flags(kind, "Options"))

    def run(*, quiet: bool, debug: bool, **arguments: Any) -> None:
        names = {each.name for each in flags}
        given = {name: value for name, value in arguments.items() if name in names and value not in (None, [])}
        own = {name: value for name, value in arguments.items() if name not in names}
        raise typer.Exit(run_to_end(lambda: verb(**own, quiet=quiet, options=kind(**given)), debug=debug))

    return _command(verb, run, [*flags, *_last_flags()])


def _command(verb: Callable[..., int], run: Callable[..., None], flags: list[inspect.Parameter]) -> Callable[..., None]:
    """Give `run` the verb's name and help, and its own parameters before the flags."""
    own = [
        each
        for name, each in inspect.signature(verb, eval_str=True).parameters.items()
        if name not in ("options", "quiet")
    ]
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own] + flags
    run.__name__, run.__doc__ = verb.__name__, verb.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {}
    return run


def parameter_from_text(name: str, text: str) -> Any:
    """Return the value of one sampling parameter written as text: JSON, or a string where one is wanted.

    Raises:
        RequestError: there is no such parameter, or the value is not allowed.
    """
    if name not in RULES:
        raise RequestError(f"unknown parameter {name!a}; allowed: {', '.join(RULES)}", name)
    value: Any = text
    if RULES[name].type != "str":
        try:
            value = parse_json(text)
        except ValueError:
            if RULES[name].type != "list[str]":
                raise RequestError(f"{name} is {text[:40]!a}; allowed: {RULES[name].allowed}", name) from None
    SamplingParams.from_mapping({name: value})
    return value


def _options(file: Path | None, given: Mapping[str, Any], own_names: Collection[str], quiet: bool) -> Options:
    settings, sampling, server = read_octavo_toml(file) if file is not None else ({}, {}, {})
    own = dict(server)
    for name, value in given.items():
        if name in own_names:
            own[name] = value
        elif name not in RULES:
            settings[name] = value
        else:
            sampling[name] = parameter_from_text(name, value) if _is_json(name) else value
    SamplingParams.from_mapping(sampling)
    return Options(EngineConfig.from_settings(settings), sampling, quiet, own, "model" in settings)


def _is_json(name: str) -> bool:
    return RULES[name].type not in _SAMPLING_TYPES


def _field_flags(kind: type, panel: str) -> Iterator[inspect.Parameter]:
    hints, docs = get_type_hints(kind), _field_docs(kind)
    for each in fields(kind):
        yield _flag(each.name, hints[each.name], _with_default(docs[each.name], each.default), panel)


def _setting_flags() -> Iterator[inspect.Parameter]:
    for part, (kind, panel) in _PARTS.items():
        hints = get_type_hints(kind)
        defaults = {each.name: each.default for each in fields(kind)}
        for name, owner in setting_names().items():
            if owner == part and name not in FILE_ONLY:
                yield _flag(name, hints[name], _with_default(_field_docs(kind)[name], defaults[name]), panel)


def _sampling_flags() -> Iterator[inspect.Parameter]:
    docs = _field_docs(SamplingParams)
    for name, rule in RULES.items():
        doc = f"{docs[name]} Takes {rule.allowed}." if rule.type != "bool" else docs[name]
        if rule.type.startswith("list") and not _is_json(name):
            doc += " Give it once for each."
        yield _flag(name, _SAMPLING_TYPES.get(rule.type, str), doc, "Sampling", "JSON" if _is_json(name) else None)


def _shared_flags() -> Iterator[inspect.Parameter]:
    yield _parameter(
        "config",
        Path | None,
        None,
        typer.Option(
            help=f"An octavo.toml with any setting, also those without a flag ({', '.join(FILE_ONLY)}), and sampling "
            "parameters under [sampling]; flags win.",
            metavar="FILE",
            rich_help_panel="Other",
        ),
    )
    yield from _last_flags()


def _last_flags() -> Iterator[inspect.Parameter]:
    panel = "Other"
    yield _parameter(
        "quiet",
        bool,
        False,
        typer.Option("--quiet", "-q", help="No start-up lines, no progress.", rich_help_panel=panel),
    )
    yield _parameter(
        "debug",
        bool,
        False,
        typer.Option("--debug", envvar="OCTAVO_DEBUG", help="Show where an error came from.", rich_help_panel=panel),
    )


def _flag(name: str, hint: Any, doc: str, panel: str, metavar: str | None = None) -> inspect.Parameter:
    """Return one optional flag; None means that it was not given."""
    members = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = members
    if get_origin(hint) is Literal:
        metavar, hint = "|".join(get_args(hint)), str
    metavar = metavar or _METAVARS.get(hint)
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        flag += f"/--no-{name.replace('_', '-')}"
    return _parameter(
        name,
        hint | None,
        None,
        typer.Option(flag, help=doc, metavar=metavar, rich_help_panel=panel, show_default=False),
    )


def _parameter(name: str, hint: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])


def _with_default(doc: str, default: Any) -> str:
    if default is MISSING or default is None or isinstance(default, bool):
        return doc
    return f"{doc} Default: {default}."


@cache
def _module_docs(module: str) -> Mapping[str, Mapping[str, str]]:
    """Return class -> field -> the string literal after it, of a whole module: Python itself does not keep them."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    found: dict[str, dict[str, str]] = {}
    for owner in tree.body:
        if not isinstance(owner, ast.ClassDef):
            continue
        docs = found.setdefault(owner.name, {})
        for node, after in pairwise(owner.body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[node.target.id] = str(after.value.value)
    return found


def _field_docs(kind: type) -> dict[str, str]:
    """Return what each field means, worded for a command line: there is no None there, only a flag not given."""
    docs = _module_docs(kind.__module__)[kind.__name__]
    return {
        each.name: re.sub(r"\bNone: ", "not given: ", docs[each.name].replace("`", "")).replace("[", "\\[")
        for each in fields(kind)
        if each.name in docs
    }
