# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""This module holds prefill attention as a Triton kernel. It does not know in what order its work was listed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import check_attention, check_positive, check_side_by_side
from ..common.launch import Target, cdiv, next_power_of_2, target
from ..common.tuned import tuned
from .invariant_triton import InvariantPlan, attend_invariant
from .quantised_triton import attend_pairs, cache_pairs, join_pairs, layer_scale, no_pairs, score_pairs, split_queries
from .tile_triton import LARGEST, LOG2E, capped, check_supported, finish, fit_tiles, load_rows, slot_rows, softmax_step
from .worklist_triton import Worklist, heads_per_tile, list_work, tokens_per_item

__all__ = ["Config", "config", "paged_attention_prefill"]


@dataclass(frozen=True, slots=True)
class Config:
    """How one call is launched: `block_m` rows are `block_q` successive query tokens times `heads` heads of a group."""

    block_m: int
    block_n: int
    heads: int
    num_warps: int
    num_stages: int

    @property
    def block_q(self) -> int:
        """Query tokens of one tile; heads that do not divide the rows leave some of them idle."""
        return self.block_m // self.heads


def config(
    *, head_dim: int, group_size: int, dtype: torch.dtype, plain: bool, quantised: bool = False, target: Target
) -> Config:
    """Return the launch settings of one geometry: as measured, or the largest tiles that spill no registers, and fit.

    Args:
        plain: without window and soft cap, which cost registers.
    """
    wide = head_dim > 128
    if dtype == torch.float32:  # exact products use no tensor cores and hold their operands in registers
        block_m, block_n, num_stages = 16 if wide else 32, 16, 2
    elif found := tuned("prefill", target.arch, head_dim=head_dim, dtype=dtype, quantised=quantised, plain=plain):
        heads = heads_per_tile(found["block_m"], group_size)
        return Config(found["block_m"], found["block_n"], heads, found["num_warps"], found["num_stages"])
    else:
        # Three stages: the keys and values of the next two tiles are on their way while one is computed.
        block_m, block_n, num_stages = 64 if wide else 128, 64, 3
        if target.arch < 90:  # the products' results and operands all take registers
            block_n = 32 if plain and next_power_of_2(group_size) == group_size else 16
            block_n *= 1 if wide else 2
        if quantised and (wide or target.arch != 90):  # what becomes of a tile's pairs takes registers, too
            block_n = 16 if target.arch < 90 else 32
    block_n, num_stages = fit_tiles(
        block_m,
        block_n,
        num_stages,
        num_warps=8,
        head_dim=head_dim,
        dtype=dtype,
        kv_itemsize=1 if quantised else None,
        target=target,
    )
    return Config(block_m, block_n, heads_per_tile(block_m, group_size), 8, num_stages)


@triton.jit
def _tile_blocks(
    p_blocks, i_key, lowest, highest, CLAMPED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return the blocks of the keys i_key .. i_key + BLOCK_N - 1: [BLOCK_N], or the one they are all in."""
    o_key = i_key
    if BLOCK_SIZE % BLOCK_N != 0:
        o_key = i_key + tl.arange(0, BLOCK_N)
    if CLAMPED:
        o_key = tl.minimum(tl.maximum(o_key, lowest), highest)
    return tl.load(p_blocks + o_key // BLOCK_SIZE)


@triton.jit
def _attend_keys(
    b_acc,
    b_max,
    b_sum,
    b_q,
    p_keys,
    p_values,
    k_scale,
    v_scale,
    p_blocks,
    o_position,
    first,
    stop,
    lowest,
    highest,
    scale,
    window,
    soft_cap,
    MASKED: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Take the keys first .. stop - 1 of a sequence into the running softmax of BLOCK_M rows.

    Args:
        first: a multiple of BLOCK_N: the order in which keys are summed depends on positions alone.
        b_acc, b_q: [BLOCK_M, BLOCK_D]; of a quantised cache what `no_pairs` and `split_queries` return.
        k_scale, v_scale: None; int8: where slot 0's is; e4m3: the layer's.
        lowest, highest: the outermost keys that any row sees; MASKED reads them where a lane is outside.
        MASKED: whether some row may not see some of the keys.
    """
    QUANTISED: tl.constexpr = p_keys.dtype.element_ty.is_int()
    o_tile = tl.arange(0, BLOCK_N)
    o_dim = tl.arange(0, BLOCK_D // 2 if QUANTISED else BLOCK_D)  # elements, or pairs
    # Looked up one tile ahead: rows whose address is known when an iteration starts can be fetched tiles in advance.
    b_block = _tile_blocks(p_blocks, first, lowest, highest, True, BLOCK_SIZE, BLOCK_N)
    for i_key in range(first, stop, BLOCK_N):
        o_key = tl.multiple_of(i_key, BLOCK_N) + o_tile  # [BLOCK_N]
        o_read = o_key
        if MASKED:
            o_read = tl.minimum(tl.maximum(o_key, lowest), highest)
        o_slot = slot_rows(b_block, o_read, SLOT_STRIDE, BLOCK_SIZE, 1)  # [BLOCK_N]
        i_next = i_key + BLOCK_N
        if not MASKED:
            i_next = tl.minimum(i_next, stop - BLOCK_N)  # whole tiles: no lane of the last one needs a clamp
        b_block = _tile_blocks(p_blocks, i_next, lowest, highest, MASKED, BLOCK_SIZE, BLOCK_N)
        if QUANTISED:
            b_keys = load_rows(p_keys, o_slot * (HEAD_DIM // 2), None, o_dim, HEAD_DIM // 2)  # [BLOCK_N, BLOCK_D / 2]
            b_scores = score_pairs(b_q, b_keys, k_scale, o_slot)  # [BLOCK_M, BLOCK_N]
        else:
            b_keys = load_rows(p_keys, o_slot * HEAD_DIM, None, o_dim, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
            b_scores = tl.dot(b_q, b_keys.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        factor = scale * LOG2E
        if soft_cap is not None:
            b_scores = capped(b_scores, scale / soft_cap, soft_cap)
            factor = 1.0
        if MASKED:
            m_visible = o_key[None, :] <= o_position[:, None]
            if window is not None:
                m_visible &= o_key[None, :] > o_position[:, None] - window
            b_scores = tl.where(m_visible, b_scores, float("-inf"))
        b_weights, b_rescale, b_max, b_sum = softmax_step(b_scores, b_max, b_sum, factor, MASKED)
        if QUANTISED:
            b_values = load_rows(p_values, o_slot * (HEAD_DIM // 2), None, o_dim, HEAD_DIM // 2)
            b_acc = attend_pairs(b_weights, b_values, b_acc, b_rescale, v_scale, o_slot, b_q[0].dtype == tl.float32)
        else:
            b_values = load_rows(p_values, o_slot * HEAD_DIM, None, o_dim, HEAD_DIM)  # [BLOCK_N, BLOCK_D]
            b_acc = tl.dot(b_weights.to(b_values.dtype), b_values, b_acc * b_rescale[:, None], input_precision="ieee")
    return b_acc, b_max, b_sum


# Metadata may be a slice from any row on: its alignment is no reason to compile again.
@triton.jit(
    do_not_specialize=["p_cu_seqlens_q", "p_seq_lens", "p_block_table", "k_scale", "v_scale", "table_stride", "window"]
)
def _prefill(
    p_q,
    p_k_cache,
    p_v_cache,
    k_scale,
    v_scale,
    p_out,
    p_lse,
    p_sinks,
    p_items,
    p_cu_seqlens_q,
    p_seq_lens,
    p_block_table,
    scale,
    window,
    soft_cap,
    table_stride,
    q_row_stride,
    out_row_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ITEM_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t, h] = softmax over visible keys of (q[t, h] · k · scale) · v.

    One program handles BLOCK_Q = BLOCK_M // HEADS successive query tokens of one sequence, with HEADS heads of one KV
    head as neighbouring rows. Grid: (work items × PARTS, KV heads × HEAD_TILES); neighbours in the first axis run
    together and share a head's keys in cache.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS
    PARTS: tl.constexpr = (ITEM_TOKENS + BLOCK_Q - 1) // BLOCK_Q
    HEAD_TILES: tl.constexpr = (GROUP_SIZE + HEADS - 1) // HEADS
    QUANTISED: tl.constexpr = p_k_cache.dtype.element_ty.is_int()
    WIDE: tl.constexpr = p_q.dtype.element_ty == tl.float32
    ROW: tl.constexpr = HEAD_DIM // 2 if QUANTISED else HEAD_DIM  # pairs, or elements
    p_item = p_items + tl.program_id(0) // PARTS * 2
    i_seq = tl.load(p_item)
    if i_seq < 0:  # more programs than work: the host knows only a bound
        return
    i_part = tl.program_id(0) % PARTS * BLOCK_Q
    i_first = tl.load(p_item + 1) * ITEM_TOKENS + i_part
    i_kv_head = tl.program_id(1) // HEAD_TILES
    i_row = tl.load(p_cu_seqlens_q + i_seq).to(tl.int32)
    query_len = tl.load(p_cu_seqlens_q + i_seq + 1).to(tl.int32) - i_row
    seq_len = tl.load(p_seq_lens + i_seq).to(tl.int32)
    if i_first >= query_len:  # the last item of a sequence may have fewer parts
        return

    o_m = tl.arange(0, BLOCK_M)
    o_token = i_first + o_m // HEADS  # [BLOCK_M], of the sequence's query tokens
    o_group = tl.program_id(1) % HEAD_TILES * HEADS + o_m % HEADS
    m_row = o_token < query_len
    if BLOCK_Q * HEADS < BLOCK_M:
        m_row &= o_m < BLOCK_Q * HEADS
    if PARTS * BLOCK_Q > ITEM_TOKENS:
        m_row &= i_part + o_m // HEADS < ITEM_TOKENS
    if HEAD_TILES * HEADS > GROUP_SIZE:
        m_row &= o_group < GROUP_SIZE
    o_head = i_kv_head * GROUP_SIZE + o_group
    o_global = (i_row + o_token).to(tl.int64)
    o_dim = tl.arange(0, BLOCK_D)
    b_q = load_rows(p_q, o_global * q_row_stride + o_head * HEAD_DIM, m_row, o_dim, HEAD_DIM)  # [BLOCK_M, BLOCK_D]

    if QUANTISED:
        b_q = split_queries(b_q)
        b_acc = no_pairs(BLOCK_M, BLOCK_D)
    else:
        b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    if p_sinks is not None:
        b_max = tl.load(p_sinks + o_head, mask=m_row, other=0.0).to(tl.float32) * LOG2E
        b_sum += 1.0
        b_sum = tl.where(b_max < float("inf"), b_sum, b_max)  # infinite where the row is all its sink's
        b_max = tl.minimum(b_max, LARGEST)  # inf - inf is NaN

    # keys       low      lead           full     end
    #   --------|--------|--------------|--------|------   BLOCK_N divides low, lead and full
    #    skipped  masked    all visible   masked           low .. lead with a window only
    position = seq_len - query_len + i_first  # of the first row; the others follow
    o_position = seq_len - query_len + o_token
    end = tl.maximum(tl.minimum(position + BLOCK_Q, seq_len), 0)
    full = tl.maximum(position + 1, 0) // BLOCK_N * BLOCK_N
    lead = 0
    lowest = 0
    if window is not None:
        lowest = tl.maximum(position - window + 1, 0)
        lead = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N, end)
    highest = tl.maximum(end - 1, 0)
    p_keys = p_k_cache + i_kv_head * (BLOCK_SIZE * ROW)
    p_values = p_v_cache + i_kv_head * (BLOCK_SIZE * ROW)
    INT8: tl.constexpr = p_k_cache.dtype.element_ty == tl.int16
    if INT8:
        k_scale += i_kv_head * BLOCK_SIZE
        v_scale += i_kv_head * BLOCK_SIZE
    elif QUANTISED:
        k_scale, v_scale = layer_scale(k_scale), layer_scale(v_scale)
    p_blocks = p_block_table + i_seq.to(tl.int64) * table_stride
    for PASS in tl.static_range(0 if window is not None else 1, 3):
        if PASS == 0:
            first, stop = lowest // BLOCK_N * BLOCK_N, lead
        elif PASS == 1:
            first, stop = lead, full
        else:
            first, stop = tl.maximum(lead, full), end
        b_acc, b_max, b_sum = _attend_keys(
            b_acc, b_max, b_sum, b_q, p_keys, p_values, k_scale, v_scale, p_blocks, o_position, first, stop, lowest,
            highest, scale, window, soft_cap, PASS != 1, NUM_KV_HEADS * BLOCK_SIZE, BLOCK_SIZE, HEAD_DIM, BLOCK_D,
            BLOCK_N,
        )  # fmt: skip

    if QUANTISED:
        b_acc = join_pairs(b_acc, v_scale, INT8, WIDE)
    b_out, b_lse = finish(b_acc, b_max, b_sum)
    m_out = m_row[:, None]
    if BLOCK_D > HEAD_DIM:
        m_out &= o_dim[None, :] < HEAD_DIM
    p_rows = p_out + o_global[:, None] * out_row_stride + o_head[:, None] * HEAD_DIM + o_dim[None, :]
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_out)
    if p_lse is not None:
        tl.store(p_lse + o_global * (NUM_KV_HEADS * GROUP_SIZE) + o_head, b_lse, mask=m_row)


def paged_attention_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cu_seqlens_q: Tensor, seq_lens: Tensor, block_table: Tensor,
    scale: float, window: int | None = None, soft_cap: float | None = None, sinks: Tensor | None = None,
    k_scale: Tensor | float | None = None, v_scale: Tensor | float | None = None, worklist: Any = None,
    out: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """See `octavo.kernels.paged_attention_prefill`. `worklist` is a `Worklist` or an `InvariantPlan`."""
    check_attention(
        q, k_cache, v_cache, cu_seqlens_q, seq_lens, block_table, window=window, soft_cap=soft_cap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, out=out,
    )  # fmt: skip
    check_supported(q, k_cache, out)
    check_positive("scale", scale)
    check_side_by_side(cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_table=block_table, sinks=sinks)
    if isinstance(worklist, InvariantPlan):
        return attend_invariant(
            q, k_cache, v_cache, worklist, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, block_table=block_table,
            scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, out=out, return_lse=return_lse,
        )  # fmt: skip
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group_size = num_q_heads // num_kv_heads
    item_tokens = tokens_per_item(head_dim, group_size)
    if worklist is None:
        worklist = list_work(cu_seqlens_q, seq_lens, num_tokens=num_tokens, item_tokens=item_tokens)
    assert isinstance(worklist, Worklist), "the worklist is of another backend or op"
    assert worklist.item_tokens == item_tokens, "the worklist is another geometry's"
    assert worklist.num_seqs == len(seq_lens), "the worklist is of another step"
    settings = config(
        head_dim=head_dim,
        group_size=group_size,
        dtype=q.dtype,
        plain=window is None and soft_cap is None,
        quantised=k_cache.dtype != q.dtype,
        target=target(q.device),
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = q.new_empty((num_tokens, num_q_heads), dtype=torch.float32) if return_lse else None
    if num_tokens:
        num_programs = len(worklist.items) * cdiv(item_tokens, settings.block_q)
        _prefill[num_programs, num_kv_heads * cdiv(group_size, settings.heads)](
            q,
            cache_pairs(k_cache),
            cache_pairs(v_cache),
            k_scale,
            v_scale,
            out,
            lse,
            sinks,
            worklist.items,
            cu_seqlens_q,
            seq_lens,
            block_table,
            scale,
            window,
            soft_cap,
            block_table.stride(0),
            q.stride(0),
            out.stride(0),
            NUM_KV_HEADS=num_kv_heads,
            GROUP_SIZE=group_size,
            HEADS=settings.heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size,
            ITEM_TOKENS=item_tokens,
            BLOCK_M=settings.block_m,
            BLOCK_N=settings.block_n,
            BLOCK_D=next_power_of_2(head_dim),
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
            # Left alone, sm_100's compiler aims at 128 registers for a quantised cache, and spills.
            maxnreg=None if k_cache.dtype == q.dtype else 255,
            enable_fp_fusion=True,
        )
    return out if lse is None else (out, lse)
