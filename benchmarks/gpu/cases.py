"""This module holds what is timed: every op's own bench cases, sweeps of attention, and their inputs, drawn on the
device where the host would take minutes. It does not know how time is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from octavo.kernels.attention import SPLIT_TOKENS
from octavo.kernels.spec import Case, OpSpec, generator, load_specs

__all__ = [
    "GROUPS",
    "Bench",
    "Level",
    "attention_inputs",
    "benches",
    "decode_plan",
    "input_bytes",
    "make_inputs",
    "plan_arguments",
]

Level = Literal["quick", "normal", "full"]
Seqs = Sequence[tuple[int, int]]

ATTENTION: Final = ("paged_attention_prefill", "paged_attention_decode")
GROUPS: Final = ("decode", "prefill", "rest")
STEP: Final = ("cu_seqlens_q", "seq_lens", "block_table")
"""What a plan is made from."""
LLAMA: Final = {"num_kv_heads": 8, "group_size": 4, "head_dim": 128, "block_size": 64}
K: Final = 1024
_LEVELS: Final = ("quick", "normal", "full")


@dataclass(frozen=True, slots=True)
class Bench:
    """One case to time; `level` is the smallest run it belongs to."""

    spec: OpSpec
    case: Case
    level: Level = "normal"

    @property
    def name(self) -> str:
        return f"{self.spec.name.removeprefix('paged_attention_')}/{self.case.name}"

    @property
    def group(self) -> str:
        """Which process times it: one that dies takes only its own with it."""
        return self.spec.name.removeprefix("paged_attention_") if self.spec.name in ATTENTION else "rest"


def _sweep(op: str, specs: dict[str, OpSpec], rows: Sequence[tuple[Level, str, Seqs, dict[str, Any]]]) -> list[Bench]:
    return [
        Bench(specs[op], Case(name, {**LLAMA, "seqs": tuple(seqs), **values}, "bfloat16", "bench"), level)
        for level, name, seqs, values in rows
    ]


def _decode_sweep(specs: dict[str, OpSpec]) -> list[Bench]:
    rows: list[tuple[Level, str, Seqs, dict[str, Any]]] = []
    for num_seqs, length in itertools.product((1, 8, 64, 256), (512, 4 * K, 32 * K)):
        level: Level = "quick" if (num_seqs, length) in ((1, 32 * K), (64, 4 * K)) else "normal"
        rows.append((level, f"{num_seqs}x{length}", [(1, length)] * num_seqs, {}))
        wide: Level = "normal" if (num_seqs, length) == (64, 4 * K) else "full"
        rows.append((wide, f"{num_seqs}x{length}-block16", [(1, length)] * num_seqs, {"block_size": 16}))
    rows += [
        ("quick", "one-65536-among-63x512", [(1, 512)] * 63 + [(1, 64 * K)], {}),
        ("normal", "64x4096-d64", [(1, 4 * K)] * 64, {"head_dim": 64}),
        ("normal", "8x32768-window4096", [(1, 32 * K)] * 8, {"window": 4 * K}),
        ("normal", "64x4096-verify4", [(4, 4 * K)] * 64, {}),
        ("full", "64x4096-group8", [(1, 4 * K)] * 64, {"group_size": 8}),
    ]
    return _sweep("paged_attention_decode", specs, rows)


def _prefill_sweep(specs: dict[str, OpSpec]) -> list[Bench]:
    rows: list[tuple[Level, str, Seqs, dict[str, Any]]] = [
        ("normal", "2048", [(2 * K, 2 * K)], {}),
        ("quick", "8192", [(8 * K, 8 * K)], {}),
        ("normal", "32768", [(32 * K, 32 * K)], {}),
        ("quick", "2048-over-30720", [(2 * K, 32 * K)], {}),
        ("normal", "8192-block16", [(8 * K, 8 * K)], {"block_size": 16}),
        ("normal", "8192-d64", [(8 * K, 8 * K)], {"head_dim": 64}),
        ("normal", "32768-window4096", [(32 * K, 32 * K)], {"window": 4 * K}),
        ("normal", "8x1024", [(K, K)] * 8, {}),
        ("full", "2048-over-30720-block16", [(2 * K, 32 * K)], {"block_size": 16}),
        ("full", "16x512-over-3584", [(512, 4 * K)] * 16, {}),
        ("full", "8192-group8", [(8 * K, 8 * K)], {"group_size": 8}),
    ]
    return _sweep("paged_attention_prefill", specs, rows)


def benches(level: Level, group: str | None = None) -> list[Bench]:
    """Return what a run of this level times, in the order in which it does: what a smaller run times, too, first."""
    specs = load_specs()
    found = [*_decode_sweep(specs), *_prefill_sweep(specs)]
    for spec in specs.values():
        found += [Bench(spec, case) for case in spec.cases if case.tier == "bench"]
    # copy_blocks has no bench case of its own: 64 blocks of a forked batch.
    copied = {**LLAMA, "num_blocks": 2 * K, "num_copies": 64}
    found.append(Bench(specs["copy_blocks"], Case("64-blocks", copied, "bfloat16", "bench")))
    wanted = _LEVELS[: _LEVELS.index(level) + 1]
    found = [bench for bench in found if bench.level in wanted and group in (None, bench.group)]
    return sorted(found, key=lambda bench: _LEVELS.index(bench.level))


def attention_inputs(case: Case, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Return one attention call on a pool whose blocks are shuffled; queries are a slice of a fused projection."""
    num_kv_heads, head_dim, block_size = case["num_kv_heads"], case["head_dim"], case["block_size"]
    num_q_heads, dtype = num_kv_heads * case["group_size"], case.torch_dtype
    on_host, on_device = (
        generator("bench", case.name, seed),
        torch.Generator("cpu" if device.type == "meta" else device),
    )
    on_device.manual_seed(seed)
    needed = [-(-seq_len // block_size) for _, seq_len in case["seqs"]]
    num_blocks = 1 + sum(needed)
    ids = (torch.randperm(num_blocks - 1, generator=on_host) + 1).to(torch.int32)
    table = torch.zeros((len(needed), max(needed)), dtype=torch.int32)
    for s, own in enumerate(ids.split(needed)):
        table[s, : len(own)] = own

    def draw(*shape: int) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        return x if device.type == "meta" else x.normal_(generator=on_device)

    query_lens = torch.tensor([0] + [query_len for query_len, _ in case["seqs"]])
    fused = draw(int(query_lens.sum()), num_q_heads + 2 * num_kv_heads, head_dim)
    inputs: dict[str, Any] = {
        "q": fused[:, :num_q_heads],
        "k_cache": draw(num_blocks, num_kv_heads, block_size, head_dim),
        "v_cache": draw(num_blocks, num_kv_heads, block_size, head_dim),
        "cu_seqlens_q": query_lens.cumsum(0).to(torch.int32).to(device),
        "seq_lens": torch.tensor([seq_len for _, seq_len in case["seqs"]], dtype=torch.int32).to(device),
        "block_table": table.to(device),
        "scale": head_dim**-0.5,
    }
    return inputs | {name: case[name] for name in ("window", "soft_cap") if case.get(name) is not None}


def make_inputs(bench: Bench, device: torch.device) -> dict[str, Any]:
    """Return one call's arguments on a device (on "meta", what says everything but the numbers)."""
    if bench.spec.name in ATTENTION and bench.case.get("cache") is None:
        return attention_inputs(bench.case, device)
    drawn = bench.spec.make_inputs(bench.case, generator("bench", bench.case.name))
    return {name: _moved(value, device) for name, value in drawn.items()}


def _moved(x: Any, device: torch.device) -> Any:
    """Return x with every tensor in it on the device, in dataclasses too."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if hasattr(x, "__dataclass_fields__"):
        return type(x)(**{name: _moved(getattr(x, name), device) for name in x.__dataclass_fields__})
    return x


def plan_arguments(bench: Bench) -> dict[str, Any]:
    """Return what `plan_paged_attention` wants to know beside the tensors, as an engine knows it."""
    case = bench.case
    query_lens = [query_len for query_len, _ in case["seqs"]]
    return {
        "op": bench.group,
        "num_tokens": sum(query_lens),
        "max_query_len": max(query_lens),
        "num_q_heads": case["num_kv_heads"] * case["group_size"],
        "num_kv_heads": case["num_kv_heads"],
        "head_dim": case["head_dim"],
        "block_size": case["block_size"],
        "max_splits": sum(-(-seq_len // SPLIT_TOKENS) for _, seq_len in case["seqs"]),
    }


def decode_plan(inputs: dict[str, Any], *, fused: bool, max_query_len: int = 1, max_splits: int | None = None) -> Any:
    """Return the Triton backend's plan of a decode call, with either form of combine."""
    from octavo.kernels.attention.plan_triton import plan_decode

    return plan_decode(
        **{name: inputs[name] for name in STEP},
        max_query_len=max_query_len,
        num_q_heads=inputs["q"].shape[1],
        head_dim=inputs["q"].shape[2],
        block_size=inputs["k_cache"].shape[2],
        max_splits=max_splits,
        fused=fused,
    )


def input_bytes(bench: Bench) -> int:
    """Return how much memory a case's tensors take, results included."""
    case = bench.case
    if "seqs" not in case.values:
        pool = 2 * case.get("num_blocks", 0) * case.get("num_kv_heads", 0) * case.get("block_size", 0)
        return int(2 * bench.spec.bytes(case) + pool * case.get("head_dim", 0) * case.itemsize)
    num_tokens = sum(query_len for query_len, _ in case["seqs"])
    num_keys = sum(-(-seq_len // case["block_size"]) * case["block_size"] for _, seq_len in case["seqs"])
    per_row = case["num_kv_heads"] * case["head_dim"] * case.itemsize
    return int(2 * num_keys * per_row + num_tokens * per_row * (2 * case["group_size"] + 2))
