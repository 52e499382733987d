"""This module holds attention with a plan made beforehand, in the place of the ops without one. It does not know what a
plan is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch
from octavo.kernels import dispatch
from octavo.kernels.attention import plan_paged_attention

from .attention_checks import same_bits

PREFILL, DECODE = "paged_attention_prefill", "paged_attention_decode"
_ARGUMENT: Final = {PREFILL: "worklist", DECODE: "plan"}


def _same(plan: Any) -> Any:
    return plan


def _planned(
    op: str,
    invariant: bool,
    change: Callable[[Any], Any],
    repeat: bool,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    **kw: Any,
) -> Any:
    plan = plan_paged_attention(
        kw["cu_seqlens_q"],
        kw["seq_lens"],
        kw["block_table"],
        op="prefill" if op == PREFILL else "decode",
        num_tokens=len(q),
        max_query_len=int(kw["cu_seqlens_q"].diff().max()),
        num_q_heads=q.shape[1],
        num_kv_heads=k_cache.shape[1],
        head_dim=q.shape[2],
        block_size=k_cache.shape[2],
        invariant=invariant,
    )
    function = dispatch.implementation(op, dispatch.current_backend())
    kw[_ARGUMENT[op]] = change(plan)
    second = function(q, k_cache, v_cache, **kw)
    if not repeat:
        return second
    # Every layer of a step uses one plan: what a call leaves in it must not change the next.
    first = function(q, k_cache, v_cache, **{**kw, "out": None})
    out, again = (x[0] if isinstance(x, tuple) else x for x in (first, second))
    num_tokens = int(kw["cu_seqlens_q"][-1])
    assert same_bits(out[:num_tokens], again[:num_tokens]), "a plan gives other bits the second time"
    return second


@contextmanager
def plans(invariant: bool, *, change: Callable[[Any], Any] = _same, repeat: bool = True) -> Iterator[None]:
    """Make both ops plan each call beforehand.

    Args:
        change: what to do with a plan before it is used.
        repeat: whether to compute everything twice with one plan and to compare.
    """
    with ExitStack() as stack:
        for op in (PREFILL, DECODE):
            stack.enter_context(dispatch.override(op, partial(_planned, op, invariant, change, repeat)))
        yield
