"""This module checks that the variants an engine can launch are known from its configuration. It does not know how they
compile.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from octavo.kernels.aot.__main__ import app
from octavo.kernels.aot.driver import fake_driver
from octavo.kernels.aot.targets import GPUS, MODELS
from octavo.kernels.common import launch
from typer.testing import CliRunner

from .programs import output_of, run_program


def test_ops_at_random_sizes_stay_in_the_set(count: Callable[[int, int], int], seed: int) -> None:
    models = ["smollm2-135m"] if count(0, 1) == 0 else list(MODELS)
    report = json.loads(
        output_of(
            "random_calls.py", f"--models={','.join(models)}", f"--steps={count(20, 100)}", f"--seed={seed}",
        )
    )  # fmt: skip
    assert report["num_launched"] > 10 * len(models)
    assert report["unknown"] == []


def test_every_argument_that_is_not_specialised_on_must_not_be() -> None:
    """The negative control: taking one `do_not_specialize` away makes variants that nobody has listed."""
    report = json.loads(
        output_of("random_calls.py", "--models=smollm2-135m", "--block-sizes=64", "--steps=16", "--despecialize")
    )
    counts = report["despecialized"]
    assert len(counts) >= 10
    assert [place for place, n in counts.items() if n == 0] == []


def test_keys_are_printed() -> None:
    lines = output_of("-m", "octavo.kernels.aot", "keys", "--model", "smollm2-135m,dtype=float16").splitlines()
    (norm,) = [line for line in lines if "rms_norm" in line and "residual=None" in line]
    assert norm.startswith("sm_90 ")
    assert "x: *fp16:16" in norm
    assert "HIDDEN_SIZE=576" in norm


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("keys", "--model", "gpt5"), "unknown model 'gpt5'; known: llama-3-8b"),
        (("keys", "--model", "gpt2,wings=2"), "unknown size 'wings'; known: num_q_heads"),
        (("keys", "--model", "gpt2,head_dim=wide"), "head_dim is 'wide'; allowed: an integer"),
        (("keys", "--model", "gpt2,window=none"), "window is 'none'; allowed: an integer"),
        (("keys", "--model", "gpt2,gated=perhaps"), "gated is 'perhaps'; allowed: true, false"),
        (("keys", "--model", "gpt2,dtype=float8"), "dtype is 'float8'; allowed: float32, float16, bfloat16"),
        (("keys", "--model", "gpt2,norm=batch"), "norm is 'batch'; allowed: rms_norm, layer_norm"),
        (("keys", "--model", "vocab_size=0"), "vocab_size is 0; it must be above 0"),
        (("keys", "--model", "num_kv_heads=3"), "32 query heads cannot share 3 KV heads"),
        (("keys", "--target", "sm_70"), "unknown target sm_70; known: sm_80, sm_89, sm_90, sm_100, sm_120"),
        (("keys", "--block-size", "64,"), "block_size is '64,'; allowed: integers"),
        (("keys", "--cache-dtype", "int4"), "cache_dtype is 'int4'; allowed: auto, int8, e4m3"),
        (("keys", "--max-num-seqs", "0"), "max_num_seqs is 0; it must be above 0"),
        (("keys", "--max-model-len", "-1"), "max_model_len is -1; it must be above 0"),
        (("report", "--json", "nowhere/report.json"), "nowhere/report.json cannot be written: there is no"),
        (("report", "--html", "nowhere/report.html"), "there is no folder nowhere"),
        (("check", "--budget", "nowhere.json"), "nowhere.json is no file; allowed: ceilings as in budget.json"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("keys", "--model", "head_dim=512"), "head_dim is 512; the triton backend takes 16 to 256\n"),
        (("check", "--model", "gpt2", "--target", "sm_90", "--kernel", "norm,typo"), "unknown kernel typo; known: _"),
    ],
)  # fmt: skip
def test_mistakes_that_only_launchers_see_are_named(arguments: tuple[str, ...], says: str) -> None:
    """In a process without the interpreter, as these are launched."""
    done = run_program("-m", "octavo.kernels.aot", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = CliRunner().invoke(app, ["keys"])
    assert done.exit_code == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr


def test_compilations_after_warm_up_are_counted_and_told_once_per_kernel() -> None:
    told = json.loads(output_of("compile_late.py"))
    assert told["counts"] == [[1, 0], [1, 0], [3, 2]]
    (message,) = told["messages"]
    assert message.startswith("kernel toy_kernel was compiled after warm-up")
    assert "ROW_STRIDE=128" in message


def test_a_target_has_the_shared_memory_that_one_program_can_have() -> None:
    """What CUDA lets one block opt in to."""
    found = {}
    for name, gpu in GPUS.items():
        with fake_driver(gpu):
            found[name] = launch._driver_target(0).shared_bytes
    assert found == {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}
