"""This module holds every op a third time: numpy in float64, whole sequences as dense matrices, other formulas.

It shares no code with the ops and none with `oracle.py`, so that a misreading would have to be made three times. It
takes the arguments of the public functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

Array = NDArray[Any]


def wide(x: Tensor, dtype: type = np.float64) -> Array:
    """Return a tensor of any dtype as a numpy array."""
    return x.detach().double().numpy().astype(dtype)


def _cached(cache: Tensor, scale: Tensor | float | None, table: Array, seq_len: int, dtype: type) -> Array:
    """Return a sequence's keys or values: [num_kv_heads, seq_len, head_dim]."""
    block_size, token = cache.shape[2], np.arange(seq_len)
    place = table[token // block_size], slice(None), token % block_size
    dense = wide(cache, dtype)[place]  # [seq_len, num_kv_heads, head_dim]
    if isinstance(scale, Tensor) and scale.dim() == 3:
        dense = dense * wide(scale, dtype)[place][..., None]
    elif scale is not None:
        dense = dense * dtype(float(scale))
    return dense.transpose(1, 0, 2)


def _hidden(query_len: int, seq_len: int, window: int | None, draft: Array | None) -> Array:
    """Return which keys each query row must not see: [query_len, seq_len] bool."""
    distance = np.arange(seq_len - query_len, seq_len)[:, None] - np.arange(seq_len)[None, :]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    if draft is not None:
        bits = (draft[:, None] >> np.arange(query_len)[None, :]) & 1
        hidden[:, seq_len - query_len :] |= bits[:, : min(query_len, seq_len)] == 0
    return hidden


def attention(inputs: dict[str, Any], dtype: type = np.float64) -> tuple[Array, Array]:
    """Return out [num_tokens, num_q_heads, head_dim] and lse [num_tokens, num_q_heads] of either attention op."""
    q, cap, sinks = wide(inputs["q"], dtype), inputs.get("soft_cap"), inputs.get("sinks")
    group_size = q.shape[1] // inputs["k_cache"].shape[1]
    out, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf, dtype)
    bounds = inputs["cu_seqlens_q"].numpy()
    for table, seq_len, start, end in zip(
        inputs["block_table"].numpy(), inputs["seq_lens"].tolist(), bounds[:-1], bounds[1:], strict=True
    ):
        if start == end:
            continue
        k, v = (
            _cached(inputs[f"{n}_cache"], inputs.get(f"{n}_scale"), table, seq_len, dtype).repeat(group_size, 0)
            for n in ("k", "v")
        )
        scores = np.einsum("thd,hkd->htk", q[start:end], k) * dtype(inputs["scale"])
        if cap is not None:
            scores = dtype(cap) * np.tanh(scores / dtype(cap))
        draft = inputs.get("draft_mask")
        draft = None if draft is None else draft.numpy()[start:end]
        scores[:, _hidden(end - start, seq_len, inputs.get("window"), draft)] = -np.inf
        total = special.logsumexp(scores, axis=-1)  # [num_q_heads, query_len]
        if sinks is not None:
            total = np.logaddexp(total, wide(sinks, dtype)[:, None])
        with np.errstate(invalid="ignore"):
            weights = np.where(np.isfinite(total)[..., None], np.exp(scores - total[..., None]), 0)
        out[start:end] = np.einsum("htk,hkd->thd", weights, v)
        lse[start:end] = total.T
    return out, lse


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, weight_offset: float = 0.0) -> Array:
    """Return x as a vector of length √n (but for eps), times the weight."""
    rows = wide(x)
    length = np.hypot(np.linalg.norm(rows, axis=-1, keepdims=True), np.sqrt(eps * rows.shape[-1]))
    direction = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return np.asarray(direction * np.sqrt(rows.shape[-1]) * (wide(weight) + weight_offset))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float) -> Array:
    """Return the centred rows as `rms_norm` scales them, plus the bias."""
    rows = wide(x)
    centred = rows - rows.mean(-1, keepdims=True)
    out = centred * wide(weight) / np.sqrt(np.var(rows, axis=-1, keepdims=True) + eps)
    return np.asarray(out if bias is None else out + wide(bias))


def activation(x: Tensor, kind: str) -> Array:
    """Return x times a distribution function: the logistic one, the normal one, or a logistic close to the normal."""
    z = wide(x)
    share = {
        "silu": lambda: special.expit(z),
        "gelu": lambda: special.ndtr(z),
        "gelu_tanh": lambda: special.expit(2 * np.sqrt(2 / np.pi) * z * (1 + 0.044715 * z * z)),
    }
    return np.asarray(z * share[kind]())


def prepared(heads: Tensor, norm: Tensor | None, inputs: dict[str, Any]) -> Array:
    """Return what `write_kv` makes of q or k: [num_tokens, heads, head_dim]. Pairs turn as complex numbers."""
    x = wide(heads)
    if norm is not None:
        x = rms_norm(heads, norm, eps=inputs["eps"])
    if inputs.get("cos_sin") is None:
        return x
    table = wide(inputs["cos_sin"])[inputs["positions"].numpy()][:, None]  # [num_tokens, 1, rotary_dim]
    half = table.shape[-1] // 2
    turn = table[..., :half] + 1j * table[..., half:]
    neox = inputs.get("rope_style", "neox") == "neox"
    first, second = (slice(0, half), slice(half, 2 * half)) if neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    turned = (x[..., first] + 1j * x[..., second]) * turn
    out = x.copy()
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def _hash(h: Array) -> Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ h >> np.uint64(shift)) * np.uint64(factor) & np.uint64(0xFFFFFFFF)
    return h


def gumbel(seed: Tensor, choice: Tensor, position: Tensor, vocab_size: int) -> Array:
    """Return each row's noise, by the definition of the sampler's hash in 32-bit words held in 64."""
    word = np.uint64(0xFFFFFFFF)
    seed, choice, position = (np.asarray(x.numpy()).astype(np.int64).view(np.uint64) for x in (seed, choice, position))
    keys = []
    for start in (0x243F6A88, 0x85A308D3):
        h = np.full(len(seed), start, dtype=np.uint64)
        for absorbed in (seed & word, seed >> np.uint64(32), choice & word, position & word):
            h = _hash(h ^ absorbed)
        keys.append(h[:, None])
    h = np.arange(vocab_size, dtype=np.uint64)[None] * np.uint64(0x9E3779B1) + keys[0] & word
    h = (h ^ h >> np.uint64(16)) * np.uint64(0x85EBCA6B) + keys[1] & word
    h = (h ^ h >> np.uint64(13)) * np.uint64(0xC2B2AE35) & word
    u = (h ^ h >> np.uint64(16)) >> np.uint64(8) | np.uint64(1)
    return np.asarray(-np.log(-np.log(u.astype(np.float64) / 2**24)))


def changed_logits(logits: Tensor, params: Any) -> Array:
    """Return the logits after everything that comes before temperature."""
    x = wide(logits)
    vocab_size = x.shape[1]
    if params.allowed is not None:
        words = params.allowed.bitmask.numpy().view(np.uint8)
        bits = np.unpackbits(words, axis=1, bitorder="little")[:, :vocab_size]
        x[params.allowed.rows.numpy()] = np.where(bits == 1, x[params.allowed.rows.numpy()], -np.inf)
    if params.banned is not None:
        x[params.banned.rows.numpy(), params.banned.token_ids.numpy()] = -np.inf
    if params.bias is not None:
        np.add.at(x, (params.bias.rows.numpy(), params.bias.token_ids.numpy()), wide(params.bias.values))
    if params.penalties is not None:
        for at, row in enumerate(params.penalties.rows.tolist()):
            state = int(params.penalties.state_rows[at])
            num = int(params.penalties.num_seen[state])
            ids, counts = (
                params.penalties.seen_ids[state, :num].numpy(),
                params.penalties.seen_counts[state, :num].numpy(),
            )
            repetition = float(params.penalties.repetition[at])
            x[row, ids] *= np.where(x[row, ids] > 0, 1 / repetition, repetition)
            x[row, ids] -= float(params.penalties.frequency[at]) * counts
            x[row, ids] -= float(params.penalties.presence[at]) * (counts > 0)
    if params.num_valid_ids is not None:
        x[:, params.num_valid_ids :] = -np.inf
    return x


class Choice(NamedTuple):
    token_id: int
    sure: bool
    """Whether float32 must come to the same token: no filter and no score is close to another decision."""


def sample(logits: Tensor, params: Any) -> list[Choice]:
    """Return each row's token; rows without one are not for this oracle."""
    x = changed_logits(logits, params)
    if params.temperature is None:
        top = np.sort(x, axis=1)[:, ::-1]
        sure = [len(row) == 1 or row[0] - row[1] > 1e-5 for row in top]
        return [Choice(int(row.argmax()), ok) for row, ok in zip(x, sure, strict=True)]
    noise = gumbel(params.seed, params.choice, params.position, x.shape[1])
    return [_draw(x[row], noise[row], params, row) for row in range(len(x))]


def _draw(x: Array, noise: Array, params: Any, row: int) -> Choice:
    temperature = float(params.temperature[row])
    if temperature == 0:
        noise, temperature = np.zeros_like(noise), 1.0
    rank = np.lexsort((np.arange(len(x)), -x))
    weight = np.exp((x[rank] - x.max()) / temperature)
    tokens = set()
    for slack in (1.0, 1.0 - 1e-5, 1.0 + 1e-5):
        kept = weight > 0
        if params.min_p is not None:
            kept &= weight >= float(params.min_p[row]) * slack
        if params.top_k is not None and params.top_k[row] > 0:
            kept &= np.arange(len(x)) < int(params.top_k[row])
        if params.top_p is not None and params.top_p[row] < 1:
            mass = np.where(kept, weight, 0)
            kept &= np.cumsum(mass) - mass < float(params.top_p[row]) * mass.sum() * slack
        score = np.where(kept, x[rank] / temperature + noise[rank], -np.inf)
        best = np.sort(score)[::-1]
        tokens.add(int(rank[score.argmax()]))
        tokens |= set() if len(best) == 1 or best[0] - best[1] > 1e-4 else {-1}
        if slack == 1.0:
            token_id = int(rank[score.argmax()])
    return Choice(token_id, len(tokens) == 1)


def log_softmax(logits: Tensor) -> Array:
    return np.asarray(special.log_softmax(wide(logits), axis=-1))
