"""This module holds the spec of the batch's expansion. It does not know any backend."""

from __future__ import annotations

from typing import Any, Final

import torch

from ..spec import Axis, Case, OpSpec, TensorSpec

__all__ = ["SPECS"]

AXES: Final = {
    "num_tokens": Axis("var", "tokens of all sequences"),
    "num_seqs": Axis("var", "sequences in this step"),
    "num_columns": Axis("var", "width of the batch's table"),
    "max_num_seqs": Axis("const", "persistent rows"),
    "max_blocks_per_seq": Axis("const", "width of the persistent tables"),
}
_INPUTS: Final = {
    "rows": TensorSpec(("num_seqs",), "int32", "each sequence's row; -1: padding"),
    "num_computed_tokens": TensorSpec(("num_seqs",), "int32", "a sequence's position before this step"),
    "cu_seqlens_q": TensorSpec(("num_seqs + 1",), "int32", "where each sequence's tokens begin"),
    "token_ids": TensorSpec(("num_tokens",), "int32", "-1: the row's last one"),
    "last_token_ids": TensorSpec(("max_num_seqs",), "int32", "by row"),
    "block_tables": TensorSpec(("max_num_seqs", "max_blocks_per_seq"), "int32", "by row"),
}
_OUTPUTS: Final = {
    "token_ids": TensorSpec(("num_tokens",), "int64", "all known"),
    "positions": TensorSpec(("num_tokens",), "int64", "of the tokens"),
    "slot_mapping": TensorSpec(("num_tokens",), "int64", "of the tokens; -1: padding"),
    "seq_lens": TensorSpec(("num_seqs",), "int32", "this step's tokens included"),
    "block_table": TensorSpec(("num_seqs", "num_columns"), "int32", "the rows' blocks, then null blocks"),
}


def _make_inputs(case: Case, generator: torch.Generator) -> dict[str, Any]:
    """Draw a step whose every number that nobody should look at is the largest there is.

    Case keys: seqs ((num_computed_tokens, query_len), ...), of query length 0: padding; block_size, max_num_seqs,
    max_blocks_per_seq, num_columns.
    """
    seqs, shape = case["seqs"], (case["max_num_seqs"], case["max_blocks_per_seq"])
    order = torch.randperm(shape[0], generator=generator)[: len(seqs)].to(torch.int32)
    last_token_ids, block_tables = (torch.full(size, torch.iinfo(torch.int32).max).int() for size in (shape[:1], shape))
    token_ids: list[torch.Tensor] = []
    for row, (first, query_len) in zip(order.tolist(), seqs, strict=True):
        num_blocks = -(-(first + query_len) // case["block_size"])
        block_tables[row, :num_blocks] = torch.randint(1, 1 << 30, (num_blocks,), generator=generator).int()
        ids = torch.randint(1, 1 << 18, (max(query_len, 1) + 1,), generator=generator).int()
        ids[0] = ids[0] * (query_len != 1)  # 0 is a token, too
        if row % 3 and query_len:  # the host does not know the last one
            last_token_ids[row], ids[-2] = ids[-1], -1
        token_ids.append(ids[:-1])
    is_padding = torch.tensor([query_len == 0 for _, query_len in seqs], dtype=torch.bool)
    starts = torch.tensor([0] + [max(query_len, 1) for _, query_len in seqs]).cumsum(0)
    firsts = torch.tensor([first for first, _ in seqs], dtype=torch.int32)
    parts = (order.masked_fill(is_padding, -1), firsts, starts, torch.cat([*token_ids, firsts[:0]]))
    # As an engine uploads them: one after the other, wherever that is.
    upload = torch.cat([order.new_zeros(1), *parts]).int()
    rows, firsts, starts, ids = upload[1:].split([len(part) for part in parts])
    return {
        "rows": rows,
        "num_computed_tokens": firsts,
        "cu_seqlens_q": starts,
        "token_ids": ids,
        "last_token_ids": last_token_ids,
        "block_tables": block_tables,
        "block_size": case["block_size"],
        "num_columns": case["num_columns"],
    }


def _num_bytes(case: Case) -> int:
    num_seqs, num_tokens = len(case["seqs"]), sum(max(query_len, 1) for _, query_len in case["seqs"])
    num_blocks = sum(-(-(first + query_len) // case["block_size"]) for first, query_len in case["seqs"])
    return int(4 * (4 * num_seqs + num_tokens + num_blocks + num_seqs * case["num_columns"]) + 24 * num_tokens)


_MIXED: Final = ((40, 1), (0, 1), (15, 1), (16, 1), (63, 5), (0, 0), (0, 17), (31, 33), (5, 1))
_SMALL: Final = {"block_size": 16, "max_num_seqs": 11, "max_blocks_per_seq": 9, "num_columns": 5}

SPECS: Final = (
    OpSpec(
        name="expand_rows",
        axes=AXES,
        inputs=_INPUTS,
        outputs=_OUTPUTS,
        options={"block_size": "tokens per block", "num_columns": "of the batch's table"},
        make_inputs=_make_inputs,
        cases=(
            Case("mixed", {**_SMALL, "seqs": _MIXED}),
            Case("decode", {**_SMALL, "seqs": ((7, 1), (64, 1), (0, 0), (15, 1), (0, 0))}),
            Case("one", {**_SMALL, "seqs": ((0, 1),), "max_num_seqs": 1, "max_blocks_per_seq": 1, "num_columns": 1}),
            Case("wide", {**_SMALL, "seqs": ((9000, 3), (1, 1)), "max_blocks_per_seq": 600, "num_columns": 600}),
            Case("long", {**_SMALL, "seqs": ((3, 700), (0, 0), (1, 1)), "max_blocks_per_seq": 50, "num_columns": 44}),
            Case(
                "blocks-of-5", {**_SMALL, "seqs": _MIXED, "block_size": 5, "max_blocks_per_seq": 19, "num_columns": 14}
            ),
            Case("padding", {**_SMALL, "seqs": ((0, 0),) * 3}),
            Case("empty", {**_SMALL, "seqs": ()}),
            Case(
                "decode-256x8192",
                {
                    "seqs": ((8191, 1),) * 256,
                    "block_size": 64,
                    "max_num_seqs": 256,
                    "max_blocks_per_seq": 2048,
                    "num_columns": 128,
                },
                tier="bench",
            ),
        ),
        bounds="copy",
        bytes=_num_bytes,
        flops=lambda case: 0,
    ),
)
