"""This module holds the specs of paged attention: shapes, cases, inputs and costs. It does not know any backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..spec import Axis, Case, OpSpec, TensorSpec

__all__ = ["SPECS", "lay_out_blocks", "make_inputs", "poisoned_cache", "quantise", "store"]

AXES: Final = {
    "num_tokens": Axis("var", "query rows of all sequences"),
    "num_seqs": Axis("var", "sequences in this step"),
    "num_blocks": Axis("var", "blocks of the pool, the null block included"),
    "max_blocks_per_seq": Axis("var", "width of the block table"),
    "num_q_heads": Axis("const", "query heads"),
    "num_kv_heads": Axis("const", "KV heads; num_q_heads = group_size * num_kv_heads"),
    "head_dim": Axis("const", "elements per head"),
    "block_size": Axis("const", "tokens per block"),
}
_CACHE = ("num_blocks", "num_kv_heads", "block_size", "head_dim")
INPUTS: Final = {
    "q": TensorSpec(("num_tokens", "num_q_heads", "head_dim"), "float", "rotated queries"),
    "k_cache": TensorSpec(_CACHE, "cache", "keys"),
    "v_cache": TensorSpec(_CACHE, "cache", "values"),
    "cu_seqlens_q": TensorSpec(("num_seqs + 1",), "int32", "first query row of each sequence"),
    "seq_lens": TensorSpec(("num_seqs",), "int32", "KV length, this step's tokens included"),
    "block_table": TensorSpec(("num_seqs", "max_blocks_per_seq"), "int32", "logical to physical blocks"),
    "sinks": TensorSpec(("num_q_heads",), "float", "a logit without a value per head", optional=True),
    "k_scale": TensorSpec(_CACHE[:3], "float32", "per slot (int8), or one number (e4m3)", optional=True),
    "v_scale": TensorSpec(_CACHE[:3], "float32", "per slot (int8), or one number (e4m3)", optional=True),
}
OUTPUTS: Final = {
    "out": TensorSpec(("num_tokens", "num_q_heads", "head_dim"), "float", "attended values"),
    "lse": TensorSpec(("num_tokens", "num_q_heads"), "float32", "ln of the denominator, with return_lse"),
}
OPTIONS: Final = {
    "scale": "factor of the scores",
    "window": "tokens a row sees, its own included; None: all",
    "soft_cap": "bound of the scores, by tanh; None: none",
}
CACHE_DTYPES: Final = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}


def lay_out_blocks(
    seq_lens: Sequence[int], block_size: int, generator: torch.Generator, *, num_spare_blocks: int = 3
) -> tuple[Tensor, int]:
    """Hand out permuted physical blocks; every padded entry names a block that nobody owns.

    Returns:
        block_table [num_seqs, max_blocks_per_seq] int32 (at least one entry beyond the longest sequence), num_blocks.
    """
    needed = [-(-seq_len // block_size) for seq_len in seq_lens]
    num_blocks = 1 + sum(needed) + num_spare_blocks
    ids = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    spare, ids = ids[:num_spare_blocks], ids[num_spare_blocks:]
    width = max(needed, default=0) + 1
    table = torch.zeros((len(seq_lens), width), dtype=torch.int32)
    for s, count in enumerate(needed):
        own, ids = ids[:count], ids[count:]
        padding = [spare[(s + i) % len(spare)] if spare else 0 for i in range(width - count)]
        table[s] = torch.tensor(own + padding, dtype=torch.int32)
    return table, num_blocks


def poisoned_cache(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a cache of NaN, or of -128, a number no quantiser writes, where the dtype has no NaN."""
    if dtype == torch.float8_e4m3fn:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(dtype)
    return torch.full(shape, -128 if dtype == torch.int8 else float("nan"), dtype=dtype)


def quantise(x: Tensor, cache: str | None, scale: float = 0.05) -> tuple[Tensor, Tensor | None]:
    """Return x as a cache of this kind stores it, and int8's scale per row of the last axis."""
    if cache == "int8":
        row_scale = x.float().abs().amax(-1) / 127
        return (x.float() / row_scale.clamp(min=1e-30)[..., None]).round().to(torch.int8), row_scale
    if cache == "e4m3":
        return (x.float() / scale).to(torch.float8_e4m3fn), None
    return x, None


def store(cache: Tensor, rows: Tensor, table_row: Tensor) -> None:
    """Write rows [seq_len, num_kv_heads, ...] to a sequence's blocks.

    Args:
        cache: [num_blocks, num_kv_heads, block_size, ...]; one-byte dtypes move as bytes (fp8 has no indexing).
        table_row: [max_blocks_per_seq], the sequence's row of the block table.
    """
    raw, rows = (cache.view(torch.uint8), rows.view(torch.uint8)) if cache.itemsize == 1 else (cache, rows)
    o_position = torch.arange(rows.shape[0])
    block_size = cache.shape[2]
    raw[table_row[o_position // block_size].long(), :, o_position % block_size] = rows


def _draw(case: Case, generator: torch.Generator) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return q, and per sequence keys and values [seq_len, num_kv_heads, head_dim], in float32."""
    num_kv_heads, group_size, head_dim = case["num_kv_heads"], case["group_size"], case["head_dim"]
    scale, kind = case.get("scale", head_dim**-0.5), case.get("kind", "iid")

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    queries, keys, values = [], [], []
    for query_len, seq_len in case["seqs"]:
        base = randn(num_kv_heads, head_dim)
        spread = 1.0 if kind == "iid" else 0.3
        q = spread * randn(query_len, num_kv_heads, group_size, head_dim)
        k, v = randn(seq_len, num_kv_heads, head_dim), randn(seq_len, num_kv_heads, head_dim)
        if kind != "iid":
            q += base[:, None]
            toward = base / (base.square().sum(-1, keepdim=True) * scale)  # adds 1 to the score of `base`
            if kind == "spotlight":
                for e in _boundaries(query_len, seq_len, case["block_size"], case.get("window")):
                    k[e] = 0.1 * k[e] + 8.0 * toward
            elif kind == "deep_negative":
                k = 0.3 * k - 200.0 * toward
        queries.append(q.reshape(query_len, num_kv_heads * group_size, head_dim) * case.get("q_gain", 1.0))
        keys.append(k)
        values.append(v)
    return torch.cat(queries), keys, values


def _boundaries(query_len: int, seq_len: int, block_size: int, window: int | None) -> list[int]:
    """Return the positions at which a kernel's bookkeeping may go wrong for the sequence's last row."""
    last = seq_len - 1
    start = last // block_size * block_size
    found = {last, last - 1, 0, start, start - 1, seq_len - query_len}
    if window is not None:
        found |= {last - window + 1}
    return sorted(e for e in found if 0 <= e <= last)


def make_inputs(case: Case, generator: torch.Generator) -> dict[str, Any]:
    """Draw a batch whose every unowned slot is poison.

    Case keys: seqs ((query_len, seq_len), ...), num_kv_heads, group_size, head_dim, block_size. Options: scale, window,
    soft_cap, sinks (True), draft (True), cache ("int8", "e4m3"), kind ("iid", "spotlight", "deep_negative"), q_gain.
    """
    q, keys, values = _draw(case, generator)
    dtype, kind = case.torch_dtype, case.get("cache")
    block_size, num_kv_heads, head_dim = case["block_size"], case["num_kv_heads"], case["head_dim"]
    table, num_blocks = lay_out_blocks([seq_len for _, seq_len in case["seqs"]], block_size, generator)
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    query_lens = torch.tensor([0] + [query_len for query_len, _ in case["seqs"]])
    inputs: dict[str, Any] = {
        "q": q.to(dtype),
        "cu_seqlens_q": query_lens.cumsum(0).to(torch.int32),
        "seq_lens": torch.tensor([seq_len for _, seq_len in case["seqs"]], dtype=torch.int32),
        "block_table": table,
        "scale": case.get("scale", head_dim**-0.5),
    }
    for name, dense in (("k", keys), ("v", values)):
        cache = poisoned_cache(shape, CACHE_DTYPES.get(kind or "", dtype))
        row_scales = torch.full(shape[:3], float("nan"))
        for s, rows in enumerate(dense):
            stored, row_scale = quantise(rows.to(dtype), kind)
            store(cache, stored, table[s])
            if row_scale is not None:
                store(row_scales, row_scale, table[s])
        inputs[f"{name}_cache"] = cache
        if kind is not None:
            inputs[f"{name}_scale"] = row_scales if kind == "int8" else torch.tensor(0.05)
    for option in ("window", "soft_cap"):
        if case.get(option) is not None:
            inputs[option] = case[option]
    if case.get("sinks"):
        inputs["sinks"] = torch.randn(q.shape[1], generator=generator).to(dtype)
    if case.get("draft"):
        bits = torch.randint(0, 1 << 16, (len(q),), generator=generator)
        own = torch.cat([torch.arange(query_len) for query_len, _ in case["seqs"]])
        inputs["draft_mask"] = bits | (1 << own)  # a row sees itself, as in every draft tree
    return inputs


def _num_pairs(case: Case) -> int:
    """Return how many (query row, key) pairs of one head are scored."""
    total, window = 0, case.get("window")
    for query_len, seq_len in case["seqs"]:
        first = seq_len - query_len
        total += sum(min(p + 1, window) if window else p + 1 for p in range(first, seq_len))
    return total


def _num_keys(case: Case) -> int:
    """Return how many keys of one head are read, each once per sequence."""
    window = case.get("window")
    return sum(
        min(seq_len, window + query_len - 1) if window else seq_len for query_len, seq_len in case["seqs"] if query_len
    )


def _num_bytes(case: Case) -> int:
    kv_bytes = 1 if case.get("cache") else case.itemsize
    num_tokens = sum(query_len for query_len, _ in case["seqs"])
    q_bytes = 2 * num_tokens * case["num_kv_heads"] * case["group_size"] * case["head_dim"] * case.itemsize
    return int(q_bytes + 2 * _num_keys(case) * case["num_kv_heads"] * case["head_dim"] * kv_bytes)


def _num_flops(case: Case) -> int:
    return int(4 * _num_pairs(case) * case["num_kv_heads"] * case["group_size"] * case["head_dim"])


def _case(
    name: str, seqs: Sequence[tuple[int, int]], dtype: str = "float32", tier: Any = "test", **values: Any
) -> Case:
    shape = {"num_kv_heads": 2, "group_size": 2, "head_dim": 64, "block_size": 16}
    return Case(name, {**shape, "seqs": tuple(seqs), **values}, dtype, tier)


_EDGES = ((1, 1), (1, 15), (1, 16), (1, 17), (0, 5), (1, 33))
_CHUNKS = ((17, 17), (3, 35), (0, 9), (1, 16), (2, 33), (16, 32))
_LLAMA = {"num_kv_heads": 8, "group_size": 4, "head_dim": 128, "block_size": 64}


def _common_cases(seqs: Sequence[tuple[int, int]]) -> tuple[Case, ...]:
    """Return the cases both ops share, on the op's own mix of sequences."""
    return (
        _case("ragged", seqs),
        _case("ragged-bf16", seqs, "bfloat16"),
        _case("ragged-fp16", seqs, "float16"),
        _case("ragged-fp64", seqs, "float64"),
        _case("spotlight", seqs, kind="spotlight"),
        _case("spotlight-bf16", seqs, "bfloat16", kind="spotlight"),
        _case("deep-negative", seqs, kind="deep_negative"),
        _case("window", seqs, window=7, kind="spotlight"),
        _case("window-one", seqs, window=1),
        _case("soft-cap", seqs, soft_cap=5.0, q_gain=8.0),
        _case("soft-cap-50", [(2, 300)], soft_cap=50.0, num_kv_heads=1, head_dim=128),
        _case("soft-cap-200", [(2, 300)], soft_cap=200.0, num_kv_heads=1, head_dim=128),
        _case("sinks", seqs, sinks=True, num_kv_heads=3, group_size=3),
        _case("everything", seqs, sinks=True, window=18, soft_cap=8.0, q_gain=6.0),
        _case("int8", seqs, cache="int8"),
        _case("int8-bf16", seqs, "bfloat16", cache="int8"),
        _case("e4m3-fp16", seqs, "float16", cache="e4m3"),
        *(_case(f"group-{g}", seqs, num_kv_heads=1, group_size=g, tier="test" if g == 7 else "all") for g in (1, 7, 8)),
        *(_case(f"head-dim-{d}", seqs, head_dim=d, tier="test" if d == 80 else "all") for d in (80, 96, 128, 256)),
        *(_case(f"block-{b}", seqs, block_size=b, tier="test" if b == 1 else "all") for b in (1, 5, 32, 64, 128)),
    )


_PREFILL_CASES = (
    *_common_cases(_CHUNKS),
    _case("long-chunk", [(129, 200), (1, 3)]),
    _case("long", [(130, 1025), (128, 128)], tier="all"),
    _case("llama-8b", [(2048, 2048)], "bfloat16", "bench", **_LLAMA),
    _case("llama-8b-chunk", [(512, 8192)], "bfloat16", "bench", **_LLAMA),
)
_DECODE_CASES = (
    *_common_cases(_EDGES),
    _case("verify", [(16, 40), (1, 70), (0, 3), (5, 5)]),
    _case("draft", [(6, 40), (1, 17), (4, 4), (16, 16)], draft=True),
    _case("draft-window", [(6, 40), (4, 4)], draft=True, window=3),
    _case("splits", [(1, 511), (1, 512), (1, 513), (1, 1025)], tier="all"),
    _case("llama-8b", [(1, 2048)] * 64, "bfloat16", "bench", **_LLAMA),
    _case("llama-8b-int8", [(1, 2048)] * 64, "bfloat16", "bench", cache="int8", **_LLAMA),
)

SPECS: Final = (
    OpSpec(
        name="paged_attention_prefill",
        axes=AXES,
        inputs=INPUTS,
        outputs=OUTPUTS,
        options=OPTIONS,
        make_inputs=make_inputs,
        cases=_PREFILL_CASES,
        bounds="attention",
        bytes=_num_bytes,
        flops=_num_flops,
    ),
    OpSpec(
        name="paged_attention_decode",
        axes=AXES,
        inputs={
            **INPUTS,
            "draft_mask": TensorSpec(("num_tokens",), "int64", "bit j: the row may see query token j", optional=True),
        },
        outputs=OUTPUTS,
        options=OPTIONS,
        make_inputs=make_inputs,
        cases=_DECODE_CASES,
        bounds="attention",
        bytes=_num_bytes,
        flops=_num_flops,
    ),
)
