"""This package holds the sampling ops. It does not know requests, rows that persist, or where the logits come from."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import active
from .params import (
    AllowedTokens,
    BannedTokens,
    LogitBias,
    LogprobOutput,
    Penalties,
    SampleOutput,
    SampleParams,
)

__all__ = [
    "AllowedTokens",
    "BannedTokens",
    "LogitBias",
    "LogprobOutput",
    "Penalties",
    "SampleOutput",
    "SampleParams",
    "log_softmax_top",
    "sample",
]


def sample(logits: Tensor, params: SampleParams, *, out: SampleOutput | None = None) -> SampleOutput:
    """Choose one token per row: argmax(logits / temperature + Gumbel noise) over the tokens the filters leave.

    In this order: allowed, banned, bias, penalties, temperature, min_p, top_k, top_p (the fewest of the most probable
    tokens whose mass among the survivors reaches it), noise. Equal logits rank by id, the lowest first. A row's token
    depends on its own logits and parameters only; rows whose logits are not finite fail alone.

    Args:
        logits: [n, vocab_size] float, unchanged.
        params: of n rows.
        out: written and returned.
    """
    result: SampleOutput = active["sample"](logits, params, out=out)
    return result


def log_softmax_top(logits: Tensor, num_top: int, token_ids: Tensor | None = None) -> LogprobOutput:
    """Compute log-probabilities of the model's own distribution: no penalty, temperature or filter enters.

    Sums do not depend on the order of their terms, so a row has the same bits in every batch.

    Args:
        logits: [n, vocab_size] float, before anything `sample` does to them.
        num_top: how many of the most probable tokens to return, 0 to vocab_size.
        token_ids: [n] int64, one more token per row to return; None: `values` and `ranks` are None.
    """
    result: LogprobOutput = active["log_softmax_top"](logits, num_top, token_ids)
    return result
