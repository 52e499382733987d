"""This package holds other libraries' attention on our inputs, and whole engines beside ours (`engine_runs`): each is
optional, and compared before it is timed. It does not know how time is taken.

A peer is a module with NAME, OPS ("decode", "prefill") and `prepare(case, inputs)`, which returns calls by what is
special about each, or raises Unsuitable. What a serving engine would do once per step (plans, index lists, another
layout of the cache) is prepared outside the call.
"""

from __future__ import annotations

import importlib
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from octavo.kernels.bounds import UNIT
from octavo.kernels.spec import Case
from torch import Tensor

from .layouts import Unsuitable

__all__ = ["PEERS", "Peer", "Unsuitable", "find", "prepare"]

PEERS: Final = ("sdpa", "flex", "flashinfer_paged", "vllm_unified", "sglang_decode", "sglang_extend")
LIMIT_U: Final = 8.0
"""How far a peer's result may be from ours, over the largest element, in u: another algorithm, not another result."""
PREPARATION_S: Final = 90.0

Call = Callable[[], Tensor]


class Peer(NamedTuple):
    """One way of one peer."""

    name: str
    make: Callable[[Case, dict[str, Any]], Call]


def find(op: str) -> Iterator[tuple[str, Peer]]:
    """Yield the ways of every peer that has this op, whether its library is here or not."""
    for name in PEERS:
        module = importlib.import_module(f".{name}", __name__)
        if op in module.OPS:
            for way, make in module.WAYS[op].items():
                peer = Peer(module.NAME + (f", {way}" if way else ""), make)
                yield peer.name, peer


_given_up: dict[str, str] = {}
"""Peers that no other case will find otherwise: name -> reason."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where something takes longer: some libraries compile for minutes on first use."""

    def ring(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def prepare(peer: Peer, case: Case, inputs: dict[str, Any], expected: Tensor) -> tuple[dict[str, Any], Call | None]:
    """Return what is known of a peer on one case, and its call where it can run and agrees with our result."""
    if peer.name in _given_up:
        return {"reason": _given_up[peer.name]}, None
    try:
        with _time_limit(PREPARATION_S):
            call = peer.make(case, inputs)
            found = call()
            if found.is_cuda:
                torch.cuda.synchronize()
    except Unsuitable as error:
        return {"reason": str(error)}, None
    except ImportError as error:
        _given_up[peer.name] = f"not here: {error}"
        return {"reason": _given_up[peer.name]}, None
    except TimeoutError:
        _given_up[peer.name] = f"not ready after {PREPARATION_S:.0f} s"
        return {"reason": _given_up[peer.name]}, None
    except Exception:  # somebody else's library, in whatever state it is
        return {"reason": traceback.format_exc(limit=-2)[-600:]}, None
    found = found.reshape(expected.shape)
    apart = float((found.double() - expected.double()).abs().max())
    allowed = LIMIT_U * UNIT[case.dtype] * float(expected.abs().max())
    facts: dict[str, Any] = {"max_abs_diff": apart}
    if not apart <= allowed:
        return facts | {"reason": f"disagrees with ours by {apart:.3g}, more than {allowed:.3g}: not timed"}, None
    return facts, call
