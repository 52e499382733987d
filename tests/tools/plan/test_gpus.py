"""This module holds how cards are found and described. It does not know plans."""

from __future__ import annotations

import pytest
from octavo.engine.errors import ConfigError
from octavo.engine.tools.gpus import GPUS, find_gpu
from octavo.kernels.aot import targets


def test_every_card_runs_the_kernels_and_is_the_one_they_are_compiled_for() -> None:
    compiled = targets.GPUS
    cards = {"sm_80": "a100", "sm_89": "4090", "sm_90": "h100", "sm_100": "b200", "sm_120": "5090"}
    assert {arch: find_gpu(name).num_sms for arch, name in cards.items()} == {
        arch: gpu.num_sms for arch, gpu in compiled.items()
    }
    for gpu in GPUS.values():
        assert int(gpu.architecture.removeprefix("sm_")) >= 80
        assert set(gpu.flops) == {"float32", "float16", "bfloat16"}
        assert gpu.flops["bfloat16"] == gpu.flops["float16"] >= 2 * gpu.flops["float32"] * 0.99
        assert 1e9 < gpu.bandwidth_bytes_per_s < 1e13
        assert 2e10 < gpu.memory_bytes < 2e11


@pytest.mark.parametrize(
    ("text", "name"),
    [("h100", "h100"), ("H100", "h100"), ("NVIDIA H100", "h100"), ("RTX 4090", "4090"), ("rtx_3090", "3090"),
     ("GeForce RTX 5090", "5090"), ("A100-40GB", "a100-40gb"), (" l4 ", "l4")],
)  # fmt: skip
def test_names_as_people_write_them(text: str, name: str) -> None:
    assert find_gpu(text) == GPUS[name]


def test_a_card_may_be_described() -> None:
    gpu = find_gpu("memory=24GiB, bandwidth=1.5TB/s,flops=100 tflops".replace(", ", ","))
    assert (gpu.memory_bytes, gpu.bandwidth_bytes_per_s, gpu.source) == (24 * 2**30, 1.5e12, "given")
    assert gpu.flops == dict.fromkeys(("float32", "float16", "bfloat16"), 1e14)


def test_a_known_card_may_be_changed() -> None:
    gpu = find_gpu("h100,bandwidth=3000GB/s,flops=798TFLOP/s")
    assert gpu.bandwidth_bytes_per_s == 3e12
    assert gpu.flops == {"float32": 67e12, "float16": 798e12, "bfloat16": 798e12}
    assert gpu.memory_bytes == GPUS["h100"].memory_bytes
    assert gpu.source == "data sheet, and as given"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("t4", "gpu t4 is sm_75; the kernels need sm_80 or newer; allowed: b200, "),
        ("V100", "gpu V100 is sm_70; the kernels need sm_80"),
        ("", "gpu is ''; allowed: b200, "),
        ("h1000", "gpu is 'h1000'; allowed: b200, h200, h100, "),
        ("memory=24GiB", "bandwidth is missing; write it as memory=24GiB,bandwidth=1TB/s,flops=160TFLOP/s"),
        ("h100,clock=2", "'clock' is no property of one; allowed: memory, bandwidth, flops"),
        ("h100,memory=10", "memory is '10'; allowed: a number above 0 and below 1e9 of GiB, GB, MiB"),
        (f"h100,memory={'9' * 400}GiB", "allowed: a number above 0 and below 1e9"),
        ("h100,memory=0GiB", "memory is '0GiB'; allowed: a number above 0"),
        ("h100,memory=-1GiB", "memory is '-1GiB'; allowed: a number above 0"),
        ("h100,memory=1GiB,memory=2GiB", "memory is given twice"),
        ("h100,", "'' is no property"),
    ],
)
def test_what_is_no_card(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_gpu(text)
    assert said in str(error.value)
