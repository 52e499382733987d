"""This module holds the choice of a backend for every op. It does not know what any op computes.

An op's public function looks its implementation up in `active` by name and calls it: one dictionary access per call.
The table fills itself on first use from the backend in force, so importing it loads neither torch nor Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Literal, get_args

__all__ = [
    "OPS",
    "TRITON_BLOCK_SIZES",
    "Backend",
    "BackendError",
    "active",
    "available_backends",
    "current_backend",
    "implementation",
    "interpreted",
    "launching_nothing",
    "override",
    "use_backend",
]

Backend = Literal["triton", "torch"]
Implementation = Callable[..., Any]

_log = logging.getLogger("octavo.kernels")

OPS: Final[dict[str, dict[Backend, str]]] = {
    "expand_rows": {"torch": ".batch.reference", "triton": ".batch.expand_triton"},
    "paged_attention_prefill": {"torch": ".attention.reference", "triton": ".attention.prefill_triton"},
    "paged_attention_decode": {"torch": ".attention.reference", "triton": ".attention.decode_triton"},
    "plan_paged_attention": {"torch": ".attention.gather", "triton": ".attention.plan_triton"},
    "write_kv": {"torch": ".kv_cache.reference", "triton": ".kv_cache.write_triton"},
    "plan_write_kv": {"torch": ".kv_cache.reference", "triton": ".kv_cache.write_triton"},
    "copy_blocks": {"torch": ".kv_cache.reference", "triton": ".kv_cache.copy_triton"},
    "rms_norm": {"torch": ".norm.reference", "triton": ".norm.norm_triton"},
    "layer_norm": {"torch": ".norm.reference", "triton": ".norm.norm_triton"},
    "gated_activation": {"torch": ".activation.reference", "triton": ".activation.activation_triton"},
    "ungated_activation": {"torch": ".activation.reference", "triton": ".activation.activation_triton"},
    "sample": {"torch": ".sampling.reference", "triton": ".sampling.sample_triton"},
    "log_softmax_top": {"torch": ".sampling.reference", "triton": ".sampling.logprobs_triton"},
}
"""Op -> backend -> the module, relative to this package, that holds a function of the op's name."""


TRITON_BLOCK_SIZES: Final = (16, 32, 64, 128)
"""Tokens per block that the attention kernels are made for; the torch backend takes any."""


class BackendError(RuntimeError):
    """A backend that was asked for cannot run: says why, and which backends can."""


class _Active(dict[str, Implementation]):
    """Op -> the implementation in force; an entry is made when it is first looked up."""

    def __missing__(self, op: str) -> Implementation:
        self[op] = function = implementation(op, current_backend())
        return function


active: Final = _Active()
_chosen: Backend | None = None
_launching_nothing = False


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors and slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(backend: Backend) -> str | None:
    """Return the reason why a backend cannot run on this machine, or None where it can."""
    if backend == "torch":
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreted() or _launching_nothing:
        return None
    import torch

    return None if torch.cuda.is_available() else "no CUDA device is visible and TRITON_INTERPRET=1 is not set"


def available_backends(*ops: str) -> tuple[Backend, ...]:
    """Return the backends that can run these ops (none named: all of them) on this machine, the fastest first."""
    return tuple(
        backend
        for backend in get_args(Backend)
        if _why_not(backend) is None and all(backend in OPS[op] for op in ops or OPS)
    )


def implementation(op: str, backend: Backend) -> Implementation:
    """Return the function that computes `op` on `backend`.

    Raises:
        BackendError: this op has no such implementation.
    """
    modules = OPS[op]
    if backend not in modules:
        raise BackendError(f"{op} has no {backend} implementation; available: {', '.join(modules)}")
    function: Implementation = getattr(importlib.import_module(modules[backend], __package__), op)
    return function


def current_backend() -> Backend:
    """Return the backend in force, choosing (and logging the choice, once) where nobody has chosen.

    The interpreter is for tests and debugging, so it is never chosen automatically.
    """
    global _chosen
    if _chosen is None:
        reason = "only the interpreter could run triton" if interpreted() else _why_not("triton")
        _chosen = "torch" if reason else available_backends()[0]
        reason = f"triton cannot run: {reason}" if reason else "the fastest available"
        _log.info("backend %s chosen automatically (%s)", _chosen, reason)
    return _chosen


class _Selection:
    """What `use_backend` returns: leaving it as a context restores the backend that was in force before."""

    def __init__(self, previous: Backend | None) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _set(self._previous)


def _set(backend: Backend | None) -> None:
    global _chosen
    _chosen = backend
    active.clear()


def use_backend(name: Backend) -> _Selection:
    """Run every op on one backend from now on, or, in a `with` statement, until its end.

    The choice holds for the whole process.

    Raises:
        BackendError: the backend is unknown or cannot run here; nothing has changed.
    """
    if name not in get_args(Backend):
        raise BackendError(f"unknown backend {name!r}; available: {', '.join(available_backends())}")
    reason = _why_not(name)
    if reason is not None:
        raise BackendError(f"backend {name} cannot run: {reason}; available: {', '.join(available_backends())}")
    selection = _Selection(_chosen)
    _set(name)
    return selection


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Let the triton backend be chosen without a GPU: the caller records launches and reads no result (`aot`)."""
    global _launching_nothing
    previous, _launching_nothing = _launching_nothing, True
    try:
        yield
    finally:
        _launching_nothing = previous


@contextmanager
def override(op: str, function: Implementation) -> Iterator[None]:
    """Put `function` in the place of one op until the end of the `with` statement (tests, comparisons)."""
    previous = active[op]
    active[op] = function
    try:
        yield
    finally:
        active[op] = previous
