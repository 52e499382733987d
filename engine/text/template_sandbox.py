"""This module holds a Jinja environment in which a hostile template can waste little. It does not know messages.

Jinja's sandbox keeps a template from reaching Python, not from looping for ever or building a string of a terabyte.
Here every loop, call, operator, literal and output is metered: steps against the clock, sizes against caps, checked
*before* anything grows. One operation on values within the caps takes milliseconds, so a render ends soon after its
time limit without signals or threads. Only filters and methods whose cost is bounded so exist.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from threading import Lock
from types import BuiltinMethodType
from typing import Any

from jinja2 import Template, Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["BoundedEnvironment", "TemplateLimits", "TemplateRefusalError"]

_MAX_INT_BITS = 4096
_LAZY_FILTERS = ("map", "reject", "rejectattr", "select", "selectattr")
_JINJA_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last"),
    *("length", "lower", "max", "min", "reverse", "round", "sort", "title", "trim", "unique", "upper", *_LAZY_FILTERS),
)
_STR_METHODS = frozenset(
    (
        *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal"),
        *("isdigit", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "join", "lower", "lstrip"),
        *("partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip"),
        *("split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
    )
)
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, _STR_METHODS),
    (dict, frozenset(("get", "items", "keys", "values"))),
    (list, frozenset(("count", "index"))),
    (tuple, frozenset(("count", "index"))),
)
_WIDE_FORMAT = re.compile(r"%[^A-Za-z%]*(?:\d{3}|\*)")


class TemplateRefusalError(TemplateError):
    """The template itself refused its input, with `raise_exception`."""


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one render may use: seconds, characters in the source, in any one value and in the output, and in all."""

    time_s: float = 2.0
    max_source_chars: int = 1 << 18
    max_chars: int = 1 << 23
    max_total_chars: int = 1 << 28


class _Meter:
    """What one render has used. A value's weight is its characters and elements, shared parts counted each time."""

    def __init__(self, limits: TemplateLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._deadline = clock() + limits.time_s
        self._total = 0
        self._weights: dict[int, tuple[object, int]] = {}

    def step(self, num_chars: int = 0) -> None:
        self._total += num_chars
        if self._total > self._limits.max_total_chars:
            raise TemplateRuntimeError(f"it builds more than {self._limits.max_total_chars} characters")
        if self._clock() > self._deadline:
            raise TemplateRuntimeError(f"it takes longer than {self._limits.time_s} s")

    def check(self, num_chars: int) -> None:
        if num_chars > self._limits.max_chars:
            raise TemplateRuntimeError(f"it builds a value of more than {self._limits.max_chars} characters")

    def weigh(self, value: object) -> int:
        if isinstance(value, str):
            return 1 + len(value)
        if not isinstance(value, list | tuple | dict):
            return 1
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        parts: Iterable[object] = value
        weight = 1
        if isinstance(value, dict):
            weight += sum(map(self.weigh, value))
            parts = value.values()
        weight += sum(map(self.weigh, parts))
        # The value is kept, so that its id is not given to another one. It cannot change: the sandbox is immutable.
        self._weights[id(value)] = (value, weight)
        return weight


class _MeteredNodes(NodeTransformer):
    """Puts a metered call before each output and into each loop, and around what builds values without a call."""

    @staticmethod
    def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
        call.set_lineno(lineno)
        return call

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:  # noqa: N802
        self.generic_visit(node)
        num_chars = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        step = self._call("metered_step", [nodes.Const(num_chars)], node.lineno)
        return [nodes.ExprStmt(step).set_lineno(node.lineno), node]

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        step = self._call("metered_step", [nodes.Const(0)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802
        self.generic_visit(node)
        return self._call("metered_concat", node.nodes, node.lineno)

    def _visit_literal(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return self._call("metered", [node], node.lineno)

    visit_List = visit_Tuple = visit_Dict = _visit_literal  # noqa: N815

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return self._call("metered_slice", [node], node.lineno) if isinstance(node.arg, nodes.Slice) else node


class _GenerationBlock(Extension):
    """Accepts `{% generation %}`, with which some templates mark the assistant's tokens for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(lineno)


class _PlainNamespace(Namespace):
    """A namespace without underscored names, which Python gives meanings of its own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError("a namespace takes no name that starts with an underscore")
        Namespace.__setitem__(self, name, value)


def _raise_exception(message: object) -> None:
    raise TemplateRefusalError(str(message)[:1000])


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates are written for (trim_blocks, lstrip_blocks, loop controls), with limits.

    Args:
        limits: what compiling or one render may use.
        strftime_now: what templates call for today's date.
        clock: monotonic seconds.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(
        self,
        limits: TemplateLimits,
        strftime_now: Callable[[str], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationBlock])
        self._limits = limits
        self._clock = clock
        self._lock = Lock()
        self._meter = _Meter(limits, clock)
        self.finalize = self._text_of
        self.globals = {
            "dict": dict,
            "namespace": _PlainNamespace,
            "raise_exception": _raise_exception,
            "range": safe_range,
            "strftime_now": strftime_now,
        }
        # Stored once: `call` tells them from a template's own calls by identity.
        self.metered_step = self._meter_step
        self.metered_concat = self._concat
        self.metered = self._measured
        self.metered_slice = self._measured_slice
        self._own_calls = {id(call) for call in (self.metered_step, self.metered_concat, self.metered)}
        self._own_calls.add(id(self.metered_slice))
        own: dict[str, Callable[..., Any]] = {
            "indent": self._indent,
            "join": self._join,
            "list": self._list,
            "replace": self._replace,
            "safe": self._text_of,
            "string": self._text_of,
            "tojson": self._tojson,
        }
        jinja = {name: FILTERS[name] for name in _JINJA_FILTERS}
        self.filters = {name: self._guard_filter(name, call) for name, call in (jinja | own).items()}

    def compile_bounded(self, source: str) -> Template:
        """Compile a template; raises TemplateError, or what Python raises where the source is nested too deeply."""
        if len(source) > self._limits.max_source_chars:
            raise TemplateRuntimeError(f"it has {len(source)} characters; allowed: {self._limits.max_source_chars}")
        with self._lock:
            self._meter = _Meter(self._limits, self._clock)
            return self.from_string(source)

    def render_bounded(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Render a template of this environment; raises TemplateError or what its Python code runs into."""
        with self._lock:
            self._meter = _Meter(self._limits, self._clock)
            parts: list[str] = []
            num_chars = 0
            try:
                for part in template.generate(variables):
                    parts.append(part)
                    num_chars += len(part)
                    self._meter.check(num_chars)
            finally:
                self._meter = _Meter(self._limits, self._clock)
            return "".join(parts)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_MeteredNodes().visit(source), *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse str.format, whose widths have no bound."""
        if isinstance(value, BuiltinMethodType) and value.__name__ in ("format", "format_map"):
            raise SecurityError("str.format is not available in chat templates")
        return None

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call something from a template, metered."""
        if id(__obj) in __self._own_calls:
            return __obj(*args)
        __self._meter.step()
        if isinstance(__obj, BuiltinMethodType):
            owner, name = __obj.__self__, __obj.__name__
            if not any(isinstance(owner, kind) and name in names for kind, names in _METHODS):
                raise SecurityError(f"the method {name!r} is not available in chat templates")
            if isinstance(owner, str) and name == "replace":
                return __self._replace(owner, *args, **kwargs)
            if isinstance(owner, str) and name == "join":
                return __self._join(args[0] if args else (), owner)
        return __self._measured(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator after bounding what it can build."""
        self._meter.step()
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > _MAX_INT_BITS:
                raise TemplateRuntimeError("it computes too large a power")
        elif operator == "%" and isinstance(left, str):
            if _WIDE_FORMAT.search(left):
                raise TemplateRuntimeError("it formats with too large a width")
            self._meter.check(len(left) + left.count("%") * (100 + self._meter.weigh(right)))
        elif operator == "+":
            self._meter.check(self._meter.weigh(left) + self._meter.weigh(right))
        return self._measured(super().call_binop(context, operator, left, right))

    def _check_product(self, left: Any, right: Any) -> None:
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(times, int):
                self._meter.check(self._meter.weigh(value) * max(times, 0))

    def _meter_step(self, num_chars: int) -> None:
        self._meter.step(num_chars)

    def _measured(self, value: Any) -> Any:
        if isinstance(value, int):
            if value.bit_length() > _MAX_INT_BITS:
                raise TemplateRuntimeError("it computes too large a number")
        elif isinstance(value, str | list | tuple | dict):
            self._meter.check(self._meter.weigh(value))
            self._meter.step(len(value))
        return value

    def _measured_slice(self, value: Any) -> Any:
        self._meter.step(len(value) if isinstance(value, str | list | tuple) else 0)
        return value

    def _text_of(self, value: Any) -> str:
        if not isinstance(value, str):
            if not (value is None or isinstance(value, bool | int | float | list | tuple | dict | Undefined)):
                raise SecurityError(f"a value of type {type(value).__name__} cannot be printed")
            self._measured(value)
            value = str(value)
        self._meter.step(len(value))
        return str(value)

    def _concat(self, *parts: Any) -> str:
        texts = [self._text_of(part) for part in parts]
        self._meter.check(sum(map(len, texts)))
        return "".join(texts)

    def _guard_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        value_at = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._meter.step()
            if name in _LAZY_FILTERS and isinstance(args[value_at], Iterable):
                args = (*args[:value_at], self._metered_items(args[value_at]), *args[value_at + 1 :])
            return self._measured(function(*args, **kwargs))

        return guarded

    def _metered_items(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._meter.step()
            yield value

    def _list(self, value: Iterable[Any]) -> list[Any]:
        return list(self._metered_items(value))

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self._text_of(text), self._text_of(old), self._text_of(new)
        times = text.count(old) if count is None or count < 0 else min(text.count(old), count)
        self._meter.check(len(text) + times * len(new))
        return str(self._measured(text.replace(old, new, -1 if count is None else count)))

    def _join(self, values: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        separator = self._text_of(d)
        num_chars = 0
        texts: list[str] = []
        for value in self._metered_items(values):
            item = value if attribute is None else self.getitem(value, attribute)
            texts.append(self._text_of(item))
            num_chars += len(texts[-1]) + len(separator)
            self._meter.check(num_chars)
        return str(self._measured(separator.join(texts)))

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        margin = width if isinstance(width, str) else " " * min(width, 1000)
        lines = (self._text_of(text) + "\n").splitlines() if blank else self._text_of(text).splitlines()
        self._meter.check(len(lines) * (1 + len(margin)) + sum(map(len, lines)))
        indented = [line if not line and not blank else margin + line for line in lines[1:]]
        opening = margin if first else ""
        return "\n".join([opening + (lines[0] if lines else ""), *indented])

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if not (indent is None or (isinstance(indent, int) and 0 <= indent <= 16)):
            raise TemplateRuntimeError(f"tojson(indent={indent!r}); allowed: none or 0 to 16")
        if separators is not None and sum(map(len, separators)) > 16:
            raise TemplateRuntimeError("tojson has separators of more than 16 characters")
        self._meter.check(self._meter.weigh(value) * (1 + (indent or 0)))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
