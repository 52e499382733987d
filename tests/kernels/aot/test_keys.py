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

from .programs import output_of


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
        output_of("random_calls.py", "--models=smollm2-135m", "--block-sizes=64", "--steps=8", "--despecialize")
    )
    counts = report["despecialized"]
    assert len(counts) >= 10
    assert [place for place, n in counts.items() if n == 0] == []


def test_an_engine_stays_in_the_set(count: Callable[[int, int], int], seed: int) -> None:
    report = json.loads(output_of("random_engine.py", f"--batches={count(2, 10)}", f"--seed={seed}"))
    assert report["num_launched"] >= 12
    assert report["unknown"] == []


def test_keys_are_printed() -> None:
    lines = output_of("-m", "octavo.kernels.aot", "keys", "--model", "smollm2-135m,dtype=float16").splitlines()
    (norm,) = [line for line in lines if "rms_norm" in line and "residual=None" in line]
    assert norm.startswith("sm_90 ")
    assert "x: *fp16:16" in norm
    assert "HIDDEN_SIZE=576" in norm


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "gpt5"), "unknown model 'gpt5'; known: llama-3-8b"),
        (("--model", "gpt2,wings=2"), "unknown size 'wings'; known: num_q_heads"),
        (("--target", "sm_70"), "unknown target sm_70; known: sm_80, sm_89, sm_90, sm_100, sm_120"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = CliRunner().invoke(app, ["keys", *arguments])
    assert done.exit_code == 2
    assert says in " ".join(done.stderr.split())


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
