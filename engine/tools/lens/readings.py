"""This module holds what is read from hidden states, layer by layer and position by position. It does not know where
they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from octavo.kernels.sampling.reference import log_softmax_top

from ...models.decoder import Decoder

__all__ = ["Ids", "Readings", "differences", "read_states"]

LOGITS_BYTES = 64 << 20
"""Of one distribution at a time: positions beyond it go in the next chunk."""

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Readings:
    """What the layers say; R layers by P positions, K candidates. NaN where a hidden state is not finite."""

    norm: Floats
    """[R, P] Euclidean length of the hidden state; of the last layer before the final norm."""
    cosine: Floats
    """[R, P] to the layer before, whether that is among the R or not; NaN for the embedding."""
    top_ids: Ids
    """[R, P, K] the likeliest tokens if the model stopped here: final norm, head, softmax. Ties to the lower id."""
    top_probability: Floats
    """[R, P, K]"""
    kl: Floats
    """[R, P] Kullback-Leibler divergence of this distribution from the last layer's, in nats."""
    answer_probability: Floats
    """[R, P] of the answer; see `Lens.answer_ids`."""
    answer_rank: Ids
    """[R, P] how many tokens are at least as likely: 1 for the likeliest."""
    next_probability: Floats
    """[R, P] of the token that comes next in the text; NaN where there is none."""
    next_rank: Ids
    """[R, P]; 0 where there is none."""


def differences(one: torch.Tensor, other: torch.Tensor) -> Floats:
    """Return [R, P], how far two paths' hidden states [R, P, H] are apart: |a - b| / |a|."""
    wide, apart = one.double(), one.double() - other.double()
    found: Floats = (apart.norm(dim=-1) / wide.norm(dim=-1)).numpy()
    return found


@torch.inference_mode()
def read_states(
    decoder: Decoder,
    states: torch.Tensor,
    layers: Sequence[int],
    *,
    next_ids: Ids,
    answer_ids: Ids,
    logits_at: Mapping[int, torch.Tensor],
    num_ids: int,
    top: int,
    on_progress: Callable[[int, int], None],
) -> tuple[Readings, Ids]:
    """Read hidden states through the final norm and the head.

    Args:
        decoder: whose they are.
        states: [num_layers + 2, P, H] float32, as `Watch.states` returns them.
        layers: which to read, ascending; the last is the model's last.
        next_ids: [P] the token that comes next in the text, -1 where there is none.
        answer_ids: [P] what each position came to; -1: what the last layer says.
        logits_at: by index into P, the logits that the engine itself drew a token from, for the last layer.
        num_ids: ids from here on belong to no token and are left out, as in sampling.
        top: candidates to keep.
        on_progress: called with (cells read, cells in all).

    Returns:
        The readings, and the answers, all of them known.
    """
    num_layers, num_positions = len(states) - 2, states.shape[1]
    answers, parts = answer_ids.copy(), []
    chunk = max(1, LOGITS_BYTES // (4 * num_ids))
    for start in range(0, num_positions, chunk):
        part = slice(start, min(start + chunk, num_positions))
        last = decoder.logits(states[num_layers, part].to(decoder.device, decoder.dtype))
        for i in range(part.start, part.stop):
            if i in logits_at:
                last[i - start] = logits_at[i].to(last.device)
        last = torch.log_softmax(last[:, :num_ids].float(), dim=-1)
        open_ones = answers[part] < 0
        answers[part][open_ones] = last.argmax(dim=-1).cpu().numpy()[open_ones]
        rows = []
        for number, layer in enumerate(layers):
            logprobs = last
            if layer != num_layers:
                normalised = decoder.normalised(states[layer, part].to(decoder.device, decoder.dtype))
                logprobs = torch.log_softmax(decoder.logits(normalised)[:, :num_ids].float(), dim=-1)
            rows.append(_row(logprobs, last, next_ids[part], answers[part], top))
            on_progress(start * len(layers) + (number + 1) * (part.stop - start), num_positions * len(layers))
        parts.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    raw = [num_layers + 1 if layer == num_layers else layer for layer in layers]
    before = states[[max(layer - 1, 0) for layer in layers]]
    cosine = torch.cosine_similarity(states[raw].double(), before.double(), dim=-1).numpy()
    cosine[[layer == 0 for layer in layers]] = np.nan
    read: dict[str, Any] = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    readings = Readings(norm=states[raw].double().norm(dim=-1).numpy(), cosine=cosine, **read)
    return readings, answers


def _row(logprobs: torch.Tensor, last: torch.Tensor, next_ids: Ids, answer_ids: Ids, top: int) -> dict[str, Any]:
    """Return what one layer says at some positions; `logprobs` and `last` are [n, num_ids]."""
    # The reference's, whatever the backend: equals rank by id, as in sampling.
    candidates = log_softmax_top(logprobs, min(top, logprobs.shape[1]))
    kl = (last.exp() * (last - logprobs)).sum(dim=-1).clamp(min=0.0)
    answer_probability, answer_rank = _of(logprobs, answer_ids)
    next_probability, next_rank = _of(logprobs, next_ids)
    return {
        "top_ids": candidates.top_ids.cpu().numpy(),
        "top_probability": candidates.top_values.double().exp().cpu().numpy(),
        "kl": kl.double().cpu().numpy(),
        "answer_probability": answer_probability,
        "answer_rank": answer_rank,
        "next_probability": next_probability,
        "next_rank": next_rank,
    }


def _of(logprobs: torch.Tensor, token_ids: Ids) -> tuple[Floats, Ids]:
    """Return the probability and the rank of a token at each position; NaN and 0 where it is none."""
    is_known = (token_ids >= 0) & (token_ids < logprobs.shape[1])
    known = torch.from_numpy(np.where(is_known, token_ids, 0)).to(logprobs.device)
    own = logprobs.gather(1, known[:, None])
    rank = (logprobs >= own).sum(dim=-1).cpu().numpy()
    return np.where(is_known, own[:, 0].double().exp().cpu().numpy(), np.nan), np.where(is_known, rank, 0)
