"""This module holds the bugs to plant in the expansion of a step's rows. It does not know what catches them."""

from __future__ import annotations

from typing import Final

from . import Patch

_EXPAND: Final = ".batch.expand_triton"

PATCHES: Final = (
    Patch(
        "position_plus_one",
        "tokens stand one position too far on",
        _EXPAND,
        "tl.where(is_row, i_first + o_token, 0)",
        "tl.where(is_row, i_first + o_token + 1, 0)",
    ),
    Patch(
        "position_in_the_step",
        "what has been computed before is forgotten",
        _EXPAND,
        "tl.where(is_row, i_first + o_token, 0)",
        "tl.where(is_row, o_token, 0)",
    ),
    Patch(
        "neighbours_table",
        "blocks are those of the row before",
        _EXPAND,
        "p_blocks + i_row.to(tl.int64) * blocks_stride",
        "p_blocks + tl.maximum(i_row - 1, 0).to(tl.int64) * blocks_stride",
    ),
    Patch(
        "table_by_place",
        "blocks are those of the row whose number is the place in the batch",
        _EXPAND,
        "p_blocks + i_row.to(tl.int64) * blocks_stride",
        "p_blocks + i_seq.to(tl.int64) * blocks_stride",
    ),
    Patch(
        "last_token_by_place",
        "the last token is that of another row",
        _EXPAND,
        "tl.load(p_last_ids + i_row, mask",
        "tl.load(p_last_ids + i_seq, mask",
    ),
    Patch(
        "last_token_of_neighbour",
        "the last token is that of the row before",
        _EXPAND,
        "tl.load(p_last_ids + i_row, mask",
        "tl.load(p_last_ids + tl.maximum(i_row - 1, 0), mask",
    ),
    Patch(
        "token_zero_unknown",
        "token 0 is taken for one that is not known",
        _EXPAND,
        "tl.where(b_token < 0, last, b_token)",
        "tl.where(b_token <= 0, last, b_token)",
    ),
    Patch(
        "unknown_tokens",
        "what the host does not know stays unknown",
        _EXPAND,
        "tl.where(b_token < 0, last, b_token)",
        "tl.where(b_token < -1, last, b_token)",
    ),
    Patch("padding_writes", "padding has a slot", _EXPAND, "% BLOCK_SIZE, -1)", "% BLOCK_SIZE, 0)"),
    Patch("padding_empty", "padding has no length", _EXPAND, "i_first + query_len, 1)", "i_first + query_len, 0)"),
    Patch(
        "length_before",
        "this step's tokens are not counted",
        _EXPAND,
        "seq_len = tl.where(is_row, i_first + query_len, 1)",
        "seq_len = tl.where(is_row, tl.maximum(i_first, 1), 1)",
    ),
    Patch(
        "block_by_remainder",
        "a token's block is looked up by its place in the block",
        _EXPAND,
        "p_own + o_position // BLOCK_SIZE, mask",
        "p_own + o_position % BLOCK_SIZE, mask",
    ),
    Patch(
        "offset_by_quotient",
        "a token's place in its block is the block's number",
        _EXPAND,
        "b_slot * BLOCK_SIZE + o_position % BLOCK_SIZE",
        "b_slot * BLOCK_SIZE + o_position // BLOCK_SIZE",
    ),
    Patch(
        "slot_overflow",
        "slots are counted in 32 bits",
        _EXPAND,
        "mask=m_known, other=0).to(tl.int64)",
        "mask=m_known, other=0)",
    ),
    Patch(
        "stale_columns",
        "the table goes on past the sequence's last block",
        _EXPAND,
        "tl.cdiv(seq_len, BLOCK_SIZE), 0)",
        "num_columns, 0)",
    ),
    Patch(
        "last_block_missing",
        "a block that holds one token only is left out",
        _EXPAND,
        "tl.cdiv(seq_len, BLOCK_SIZE), 0)",
        "tl.cdiv(seq_len - 1, BLOCK_SIZE), 0)",
    ),
    Patch(
        "first_columns_only",
        "every program handles the first part of the table",
        _EXPAND,
        "o_column = i_part * BLOCK + o_block",
        "o_column = o_block",
    ),
    Patch(
        "first_tokens_only",
        "every program handles the first part of the tokens",
        _EXPAND,
        "range(i_part * BLOCK, query_len",
        "range(0, tl.minimum(query_len, BLOCK)",
    ),
    Patch(
        "columns_side_by_side",
        "the table's rows are taken to lie side by side",
        _EXPAND,
        "out.block_table.stride(0)",
        "num_columns",
    ),
)
