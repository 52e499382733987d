"""This module holds every planted bug and the checks that must catch it. It does not know how results are shown.

A bug is planted in a second, plain implementation of the op, which stands in for the real one while the checks run: the
real one may be rewritten for speed without one bug losing its place. Bugs in the kernels are in `kernels.py`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
_TESTS: Final = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Mutant:
    """One bug: while `plant()` is entered, one of `checks` must raise AssertionError."""

    name: str
    meaning: str
    plant: Callable[[], AbstractContextManager[None]]
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


@contextmanager
def _stand_in(ops: dict[str, Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(dispatch.use_backend("torch"))
        for op, function in ops.items():
            stack.enter_context(dispatch.override(op, function))
        yield


def _attention(bug: str | None) -> Callable[[], AbstractContextManager[None]]:
    return partial(_stand_in, {op: partial(attention.attend, bug) for op in (PREFILL, DECODE)})


def _small(op: str, bug: str | None) -> Callable[[], AbstractContextManager[None]]:
    return partial(_stand_in, {op: partial(getattr(small_ops, op), bug)})


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


def _is_a_checks_own(error: AssertionError) -> bool:
    """Whether a check raised it, or the bounds layer, and not the op itself, which is a crash."""
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_TESTS)


def killer(mutant: Mutant) -> str | None:
    """Return the check that turns red and why, or None where the bug survives.

    A crash proves nothing: where no check catches the bug, the first crash passes through.
    """
    crash: Exception | None = None
    with mutant.plant(), poisoned_allocations():
        for name, check in mutant.checks:
            try:
                check()
            except AssertionError as error:
                if _is_a_checks_own(error):
                    layer = "bounds, in " if type(error).__name__ == "OutOfBoundsError" else ""
                    return f"{layer}{name}: {str(error).partition(chr(10))[0]}"
                crash = crash or error
            except Exception as error:
                crash = crash or error
    if crash is not None:
        raise crash
    return None
