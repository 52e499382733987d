"""This module holds what becomes of settings that need more memory than there is. It does not know how it is shown."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.config import EngineConfig
from octavo.engine.errors import CapacityError, ConfigError
from octavo.engine.footprint import split_bytes, step_memory, table_bytes
from octavo.engine.resolve import Hardware, ResolvedConfig, flags, resolve, ways_to_fit
from octavo.engine.tools.gpus import find_gpu
from octavo.engine.tools.plan import NoRoomError, make_plan, read_model

GIB = 2**30
LLAMA = read_model(str(Path(__file__).parent / "configs" / "llama-3.1-8b.json"))


def config(**settings: Any) -> EngineConfig:
    return EngineConfig.from_settings(settings)


def total(resolved: ResolvedConfig) -> int:
    return resolved.weight_bytes + resolved.graph_bytes + resolved.activation_bytes + resolved.kv_cache_bytes


@pytest.mark.parametrize("share", [0.6, 0.9, 1.0])
def test_a_gpu_is_filled_to_its_share_and_not_one_block_more(share: float) -> None:
    hardware = Hardware("cuda", "a GPU", 60 * GIB)
    resolved = resolve(config(gpu_memory_utilization=share), LLAMA, hardware)
    # The table of rotations is reckoned with at the model's whole length; here the pool is longer than that.
    step = step_memory(LLAMA, "bfloat16", num_tokens=2048, num_seqs=256).peak
    fixed = (
        resolved.weight_bytes
        + resolved.graph_bytes
        + step
        + table_bytes(LLAMA, 131_072)
        + split_bytes(LLAMA, num_seqs=256, kv_tokens=0)
    )
    pool = total(resolved) - fixed
    one_more = 64 * 131_072 + split_bytes(LLAMA, num_seqs=0, kv_tokens=64)
    assert pool <= int((60 * GIB - fixed) * share) < pool + one_more
    assert resolved.kv_cache_bytes == (resolved.num_blocks + 1) * 64 * 131_072


def test_a_larger_step_leaves_less_to_the_pool() -> None:
    hardware = Hardware("cuda", "a GPU", 40 * GIB)
    pools = [
        resolve(config(max_num_batched_tokens=tokens, gpu_memory_utilization=1.0), LLAMA, hardware).kv_cache_bytes
        for tokens in (2048, 65_536)
    ]
    grown = step_memory(LLAMA, "bfloat16", num_tokens=65_536, num_seqs=256).peak
    grown -= step_memory(LLAMA, "bfloat16", num_tokens=2048, num_seqs=256).peak
    assert pools[0] - pools[1] == pytest.approx(grown, rel=0.01)


@pytest.mark.parametrize(
    ("gib", "settings", "said", "way"),
    [
        (24, {"dtype": "float32"}, "the weights take 29.92 GiB and a GPU has 24.00 GiB left", "--dtype bfloat16"),
        (24, {"max_model_len": 131_072}, "a sequence of 131,072 tokens takes 16.00 GiB", "--max-model-len 61440"),
        (24, {"kv_cache_tokens": 10**6}, "a KV pool of 1,000,000 tokens takes 122.5", "--kv-cache-tokens 61440"),
        (24, {"max_num_batched_tokens": 10**6}, "the tensors of a step 95.58 GiB", "--max-num-batched-tokens 512"),
        (8, {}, "the weights take 14.96 GiB", "a smaller model, or a machine with more memory"),
    ],
)
def test_what_does_not_fit_is_told_with_a_number_and_a_way_out(
    gib: int, settings: dict[str, Any], said: str, way: str
) -> None:
    with pytest.raises(CapacityError) as error:
        resolve(config(**settings), LLAMA, Hardware("cuda", "a GPU", gib * GIB))
    assert said in str(error.value)
    assert f"; try {way}" in str(error.value)


def test_every_way_out_is_one(count: Callable[[int, int], int], seed: int) -> None:
    rng, num_refused, num_ways = random.Random(seed), 0, 0
    for _ in range(count(150, 2000)):
        model = replace(LLAMA, num_layers=rng.choice([2, 8, 32]), dtype=rng.choice(["bfloat16", "float16", "float32"]))
        device = rng.choice(["cpu", "cuda"])
        hardware = Hardware(device, "this machine", int(rng.uniform(1, 40) * GIB))
        settings = {
            "dtype": rng.choice(["auto", "float32", "bfloat16"]),
            "kv_cache_tokens": rng.choice([None, 4096, 10**5, 10**6]),
            "max_model_len": rng.choice([None, 4096, 10**5]),
            "max_num_batched_tokens": rng.choice([None, 64, 10**4, 10**6]),
            "max_num_seqs": rng.choice([1, 8, 256]),
            "block_size": rng.choice([16, 64]),
            "kv_cache_dtype": rng.choice(["auto", "auto", "int8", "fp8"]),
        }
        wanted = config(**settings)
        try:
            resolved = resolve(wanted, model, hardware)
        except ConfigError:
            continue
        except CapacityError as error:
            said = str(error)
        else:
            assert total(resolved) <= hardware.available_bytes
            continue
        num_refused += 1
        ways = ways_to_fit(wanted, model, hardware)
        assert len(ways) <= 3
        for way in ways:
            assert flags(way) in said
            fitting = resolve(config(**(settings | way)), model, hardware)
            assert total(fitting) <= hardware.available_bytes
            assert all(getattr(fitting, name, value) == value for name, value in way.items())
            num_ways += 1
    assert num_refused > 20
    assert num_ways > 20


@pytest.mark.parametrize(
    ("settings", "ways"),
    [
        ({"max_model_len": 100_000}, [{"kv_cache_dtype": "fp8"}]),
        ({"max_model_len": 100_000, "kv_cache_dtype": "int8"}, []),
    ],
)
def test_keys_and_values_of_fewer_bits_are_a_way_out(settings: dict[str, Any], ways: list[dict[str, Any]]) -> None:
    """Where the pool is too small for the longest sequence, and not where they have few bits already."""
    found = ways_to_fit(config(**settings, gpu_memory_utilization=0.97), LLAMA, Hardware("cuda", "a GPU", 26 * GIB))
    assert [way for way in found if "kv_cache_dtype" in way][:1] == ways


def test_settings_are_written_as_flags() -> None:
    written = flags({"max_model_len": 10, "dtype": "bfloat16", "invariant": True, "prefix_caching": False})
    assert written == "--max-model-len 10 --dtype bfloat16 --invariant --no-prefix-caching"


def test_a_plan_without_room_names_the_cards_that_have_it() -> None:
    with pytest.raises(NoRoomError, match=r"^the weights take 29.92 GiB and NVIDIA L4 has 21.99 GiB left$") as error:
        make_plan(config(dtype="float32"), LLAMA, find_gpu("l4"))
    assert error.value.ways == ({"dtype": "bfloat16"},)
    assert error.value.gpus == ("5090", "a100-40gb", "l40s", "h100", "h100-pcie", "a100", "h200", "b200")


def test_other_dtypes_are_what_a_plan_of_them_says() -> None:
    plan = make_plan(EngineConfig(), LLAMA, find_gpu("a100"))
    assert [each.is_current for each in plan.variants] == [False, False, False, True, False, False]
    for each in plan.variants:
        kind = "auto" if each.kv_cache_dtype == each.dtype else each.kv_cache_dtype
        wanted = config(dtype=each.dtype, kv_cache_dtype=kind)
        other = make_plan(wanted, LLAMA, find_gpu("a100"), contexts=[8192])
        assert (other.pool_tokens, dict(other.concurrency)[8192]) == (each.pool_tokens, each.num_seqs)
        assert (other.resolved.weight_bytes, other.resolved.kv_bytes_per_token) == (
            each.weight_bytes,
            each.kv_bytes_per_token,
        )
        current = [one for one in other.variants if one.is_current]
        assert [one.kv_cache_dtype for one in current] == [each.kv_cache_dtype]


def test_sizes_asked_for_are_predicted_or_refused() -> None:
    plan = make_plan(EngineConfig(), LLAMA, find_gpu("h100"), contexts=[4000, 100], batch_sizes=[5])
    assert [each.num_tokens for each in plan.prefills] == [100, 4000]
    assert [(each.batch_size, each.context) for each in plan.decodes] == [(5, 100), (5, 4000)]
    with pytest.raises(ConfigError, match="context is 131073; allowed: at most max_model_len, 131072"):
        make_plan(EngineConfig(), LLAMA, find_gpu("h100"), contexts=[131_073])
    with pytest.raises(ConfigError, match="batch is 257; allowed: at most max_num_seqs, 256"):
        make_plan(EngineConfig(), LLAMA, find_gpu("h100"), batch_sizes=[257])


def test_predictions_hang_together() -> None:
    plan = make_plan(EngineConfig(), LLAMA, find_gpu("h100"))
    for each in plan.decodes:
        assert each.tokens_per_s == pytest.approx(each.batch_size / each.step_s)
        assert each.fits == (each.batch_size * -(-each.context // 64) <= plan.resolved.num_blocks)
    for some in plan.prefills:
        assert some.tokens_per_s == pytest.approx(some.num_tokens / some.seconds)
        # No step computes more than the card can: the weights of the layers, twice per token.
        assert some.tokens_per_s < 989e12 / (2 * 6.98e9)
    one = {(each.batch_size, each.context): each.step_s for each in plan.decodes}
    # 15.0 GB of weights are read in each step: 4.5 ms at 3.35 TB/s.
    assert one[1, 512] == pytest.approx(15.01e9 / 3.35e12, rel=0.01)
