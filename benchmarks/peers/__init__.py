"""This package holds other libraries' attention on our inputs: each is optional, and compared before it is timed. It
does not know how time is taken.

A peer is a module with NAME, OPS ("decode", "prefill") and `prepare(case, inputs)`, which returns calls by what is
special about each, or raises Unsuitable. What a serving engine would do once per step (plans, index lists, another
layout of the cache) is prepared outside the call.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from octavo.kernels.bounds import UNIT
from octavo.kernels.spec import Case
from torch import Tensor

from .layouts import Unsuitable

__all__ = ["PEERS", "Peer", "Unsuitable", "find", "prepare"]

PEERS: Final = ("sdpa", "flex", "flashinfer_paged", "vllm_unified", "sglang_decode")
LIMIT_U: Final = 8.0
"""How far a peer's result may be from ours, over the largest element, in u: another algorithm, not another result."""

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


def prepare(peer: Peer, case: Case, inputs: dict[str, Any], expected: Tensor) -> tuple[dict[str, Any], Call | None]:
    """Return what is known of a peer on one case, and its call where it can run and agrees with our result."""
    try:
        call = peer.make(case, inputs)
        found = call()
        torch.cuda.synchronize() if found.is_cuda else None
    except Unsuitable as error:
        return {"reason": str(error)}, None
    except ImportError as error:
        return {"reason": f"not here: {error}"}, None
    except Exception:  # somebody else's library, in whatever state it is
        return {"reason": traceback.format_exc(limit=-2)[-600:]}, None
    found = found.reshape(expected.shape)
    apart = float((found.double() - expected.double()).abs().max())
    allowed = LIMIT_U * UNIT[case.dtype] * float(expected.abs().max())
    facts: dict[str, Any] = {"max_abs_diff": apart}
    if not apart <= allowed:
        return facts | {"reason": f"disagrees with ours by {apart:.3g}, more than {allowed:.3g}: not timed"}, None
    return facts, call
