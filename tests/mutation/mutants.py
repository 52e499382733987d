"""This module holds every planted bug and the checks that must catch it. It does not know how results are shown.

A bug is planted in a second, plain implementation of the op, which stands in for the real one while the checks run:
the real one may be rewritten for speed without one bug losing its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from octavo.kernels import dispatch
from octavo.kernels.spec import load_specs

from tests.kernels import attention_checks, kv_cache_checks, mlp_checks, norm_checks
from tests.kernels.allocation import poisoned_allocations
from tests.kernels.attention_rounding import check_rounding
from tests.kernels.paged import Shape

from . import attention, small_ops

Check = Callable[[], None]
Checks = tuple[tuple[str, Check], ...]
"""(layer and name, check), in the order they are tried."""


@dataclass(frozen=True)
class Mutant:
    """One planted bug: `ops` replaces these ops, and one of `checks` must raise AssertionError."""

    name: str
    meaning: str
    ops: dict[str, Callable[..., Any]]
    checks: Checks


PREFILL: Final = "paged_attention_prefill"
DECODE: Final = "paged_attention_decode"
_ATTENTION_SHAPES: Final = (
    (PREFILL, Shape(((1, 1), (17, 17), (0, 9), (3, 65)))),
    (DECODE, Shape(((1, 1), (1, 32), (0, 9), (1, 65), (3, 7)))),
    (PREFILL, Shape(((5, 60),), num_kv_heads=3, group_size=3, window=18)),
    (DECODE, Shape(((2, 40), (1, 5)), num_kv_heads=3, group_size=3, window=7)),
    (DECODE, Shape(((1, 1030),), num_kv_heads=1, group_size=1, block_size=64)),
)
_ROUNDING_CASES: Final = (
    (DECODE, "ragged"),
    (DECODE, "soft-cap"),
    (DECODE, "sinks"),
    (DECODE, "int8"),
    (PREFILL, "ragged"),
)


def _attention_checks() -> Checks:
    checks: list[tuple[str, Check]] = []
    for op, shape in _ATTENTION_SHAPES:
        named = attention_checks.EXACT | (attention_checks.EXACT_WINDOW if shape.window is not None else {})
        checks += [(f"exact: {name}", partial(check, op, shape)) for name, check in named.items()]
    specs = load_specs()
    for op, name in _ROUNDING_CASES:
        checks.append((f"rounding: {name}", partial(check_rounding, specs[op], specs[op].case(name), 0)))
    op, shape = _ATTENTION_SHAPES[0]
    for name, check in attention_checks.INVARIANCE.items():
        checks.append((f"invariance: {name}", partial(check, op, shape)))
    return tuple(checks)


_CHECKS: Final = {
    "write_kv": kv_cache_checks.CHECKS,
    "copy_blocks": kv_cache_checks.COPY_CHECKS,
    "rms_norm": norm_checks.RMS_CHECKS,
    "layer_norm": norm_checks.LAYER_CHECKS,
    "gated_activation": mlp_checks.CHECKS,
}


def _attention(bug: str | None) -> dict[str, Callable[..., Any]]:
    return {op: partial(attention.attend, bug) for op in (PREFILL, DECODE)}


def _small(op: str, bug: str | None) -> dict[str, Callable[..., Any]]:
    return {op: partial(getattr(small_ops, op), bug)}


def mutants() -> list[Mutant]:
    """Return every planted bug, attention's first."""
    checks = _attention_checks()
    found = [Mutant(f"attention: {bug}", text, _attention(bug), checks) for bug, text in attention.BUGS.items()]
    for op, bugs in small_ops.BUGS.items():
        found += [Mutant(f"{op}: {bug}", text, _small(op, bug), _CHECKS[op]) for bug, text in bugs.items()]
    return found


def healthy() -> list[Mutant]:
    """Return the same stand-ins without a bug: every check must pass."""
    found = [Mutant("attention: no bug", "", _attention(None), _attention_checks())]
    return found + [Mutant(f"{op}: no bug", "", _small(op, None), checks) for op, checks in _CHECKS.items()]


@contextmanager
def _planted(mutant: Mutant) -> Iterator[None]:
    with ExitStack() as stack:
        for op, function in mutant.ops.items():
            stack.enter_context(dispatch.override(op, function))
        yield


def killer(mutant: Mutant) -> str | None:
    """Return the check that turns red and why, or None where the bug survives; any other exception passes through."""
    with dispatch.use_backend("torch"), poisoned_allocations(), _planted(mutant):
        for name, check in mutant.checks:
            try:
                check()
            except AssertionError as error:
                return f"{name}: {str(error).partition(chr(10))[0]}"
    return None
