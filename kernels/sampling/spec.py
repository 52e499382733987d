"""This module holds the specs of the sampling ops. It does not know any backend."""

from __future__ import annotations

from typing import Any, Final

import torch

from ..spec import Axis, Case, OpSpec, TensorSpec
from .params import AllowedTokens, BannedTokens, LogitBias, Penalties, SampleParams

__all__ = ["SPECS"]

AXES: Final = {
    "num_seqs": Axis("var", "rows to sample"),
    "vocab_size": Axis("const", "width of the logits"),
}
_LOGITS: Final = TensorSpec(("num_seqs", "vocab_size"), "float", "what the model says of the next token")
_NUM_SEEN: Final = 40
_INT32: Final = torch.iinfo(torch.int32)


def _make_logits(case: Case, generator: torch.Generator) -> torch.Tensor:
    shape = case["num_seqs"], case["vocab_size"]
    logits = torch.randn(shape, generator=generator) * float(case.get("spread", 3.0))
    return logits.to(case.torch_dtype)


def _make_entries(case: Case, generator: torch.Generator) -> SampleParams:
    """Return each feature that few rows use, on a third of the rows."""
    num_seqs, vocab_size = case["num_seqs"], case["vocab_size"]
    rows = torch.arange(0, num_seqs, 3)
    shape, num_seen = (num_seqs, min(_NUM_SEEN, vocab_size)), len(rows)
    words = (num_seen, -(-vocab_size // 32))
    ids = torch.rand(num_seqs, vocab_size, generator=generator).argsort(-1)[:, : shape[1]].to(torch.int32)
    ones = torch.ones(num_seen)
    return SampleParams(
        allowed=AllowedTokens(
            rows,
            torch.randint(_INT32.min, _INT32.max, words, generator=generator, dtype=torch.int64).to(torch.int32),
        ),
        banned=BannedTokens(rows, torch.randint(vocab_size, (num_seen,), generator=generator)),
        bias=LogitBias(rows, torch.randint(vocab_size, (num_seen,), generator=generator), 2.0 * ones),
        penalties=Penalties(
            rows=rows,
            repetition=1.2 * ones,
            presence=0.5 * ones,
            frequency=0.25 * ones,
            state_rows=rows.flip(0),
            seen_ids=ids,
            seen_counts=torch.randint(4, shape, generator=generator, dtype=torch.int32),
            num_seen=torch.randint(shape[1] + 1, (num_seqs,), generator=generator, dtype=torch.int32),
        ),
    )


def _make_sample_inputs(case: Case, generator: torch.Generator) -> dict[str, Any]:
    num_seqs = case["num_seqs"]
    entries = _make_entries(case, generator) if case.get("entries") else SampleParams()
    temperature, top_k, top_p, min_p = (case.get(name) for name in ("temperature", "top_k", "top_p", "min_p"))

    def per_row(value: float | None, dtype: torch.dtype) -> torch.Tensor | None:
        return None if value is None else torch.full((num_seqs,), value, dtype=dtype)

    params = SampleParams(
        num_valid_ids=case.get("num_valid_ids"),
        temperature=per_row(temperature, torch.float32),
        top_k=per_row(top_k, torch.int32),
        top_p=per_row(top_p, torch.float64),
        min_p=per_row(min_p, torch.float64),
        seed=torch.randint(2**63 - 1, (num_seqs,), generator=generator),
        choice=torch.arange(num_seqs, dtype=torch.int32) % 3,
        position=torch.arange(num_seqs) * 7,
        allowed=entries.allowed,
        banned=entries.banned,
        bias=entries.bias,
        penalties=entries.penalties,
    )
    return {"logits": _make_logits(case, generator), "params": params}


def _make_logprob_inputs(case: Case, generator: torch.Generator) -> dict[str, Any]:
    chosen = torch.randint(case["vocab_size"], (case["num_seqs"],), generator=generator)
    return {"logits": _make_logits(case, generator), "num_top": case["num_top"], "token_ids": chosen}


def _logit_bytes(case: Case) -> int:
    return int(case["num_seqs"] * case["vocab_size"] * case.itemsize)


_SMALL: Final = {"num_seqs": 7, "vocab_size": 259}
_BIG: Final = {"num_seqs": 64, "vocab_size": 128256}
_CHAT: Final = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}

SPECS: Final = (
    OpSpec(
        name="sample",
        axes=AXES,
        inputs={"logits": _LOGITS},
        outputs={
            "token_ids": TensorSpec(("num_seqs",), "int64", "the token sampled"),
            "failed": TensorSpec(("num_seqs",), "bool", "rows without finite logits or without a token left"),
        },
        options={"params": "per-row settings, `SampleParams`"},
        make_inputs=_make_sample_inputs,
        cases=(
            *(Case(f"greedy-{dtype}", _SMALL, dtype) for dtype in ("float32", "bfloat16", "float16", "float64")),
            *(Case(f"chat-{dtype}", {**_SMALL, **_CHAT}, dtype) for dtype in ("float32", "bfloat16", "float64")),
            Case("temperature", {**_SMALL, "temperature": 1.3}),
            Case("nucleus", {**_SMALL, "temperature": 1.0, "top_p": 0.9, "spread": 0.5}),
            Case("min_p", {**_SMALL, "temperature": 1.5, "min_p": 0.05}),
            Case("entries", {**_SMALL, "temperature": 1.0, "entries": True, "num_valid_ids": 250}),
            Case("entries-greedy", {**_SMALL, "entries": True}, "bfloat16"),
            Case("one", {"num_seqs": 1, "vocab_size": 1, "temperature": 1.0}),
            Case("empty", {"num_seqs": 0, "vocab_size": 32, **_CHAT}),
            Case("greedy-128k", _BIG, "bfloat16", "bench"),
            Case("temperature-128k", {**_BIG, "temperature": 1.0}, "bfloat16", "bench"),
            Case("chat-128k", {**_BIG, **_CHAT}, "bfloat16", "bench"),
            Case("nucleus-128k", {**_BIG, "temperature": 1.0, "top_p": 0.95}, "bfloat16", "bench"),
        ),
        bounds="copy",
        bytes=_logit_bytes,
        flops=lambda case: 4 * case["num_seqs"] * case["vocab_size"],
    ),
    OpSpec(
        name="log_softmax_top",
        axes={**AXES, "num_top": Axis("var", "top tokens to return")},
        inputs={
            "logits": _LOGITS,
            "token_ids": TensorSpec(("num_seqs",), "int64", "one more token per row to return", optional=True),
        },
        outputs={
            "top_values": TensorSpec(("num_seqs", "num_top"), "float32", "log-probabilities, descending"),
            "top_ids": TensorSpec(("num_seqs", "num_top"), "int64", "their ids"),
            "values": TensorSpec(("num_seqs",), "float32", "log-probabilities of `token_ids`"),
            "ranks": TensorSpec(("num_seqs",), "int64", "how many tokens are at least as likely"),
        },
        options={"num_top": "top tokens to return"},
        make_inputs=_make_logprob_inputs,
        cases=(
            *(Case(f"top-5-{dtype}", {**_SMALL, "num_top": 5}, dtype) for dtype in ("float32", "bfloat16", "float64")),
            Case("chosen-only", {**_SMALL, "num_top": 0}),
            Case("all", {**_SMALL, "num_top": 259, "spread": 0.1}),
            Case("empty", {"num_seqs": 0, "vocab_size": 32, "num_top": 3}),
            Case("top-20-128k", {**_BIG, "num_top": 20}, "bfloat16", "bench"),
        ),
        bounds="log_softmax",
        bytes=_logit_bytes,
        flops=lambda case: 4 * case["num_seqs"] * case["vocab_size"],
    ),
)
