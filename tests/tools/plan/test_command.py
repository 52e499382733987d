"""This module holds `octavo plan` as it is typed and read. It does not know the arithmetic."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from octavo.engine import cli
from octavo.engine.tools import cpu
from octavo.engine.tools.gpus import Gpu

CONFIGS = Path(__file__).parent / "configs"
LLAMA = str(CONFIGS / "llama-3.1-8b.json")


class Ran(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return `plan(*words)`: run `octavo plan` in this process."""

    def run(*words: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["octavo", "plan", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ran(int(ended.value.code or 0), *capsys.readouterr())

    return run


def rows(text: str, title: str) -> list[list[str]]:
    """Return the cells of the lines below a title."""
    lines = text.split(f"\n{title}")[1].splitlines()[1:]
    return [line.split() for line in lines[: next(i for i, line in enumerate([*lines, ""]) if line[:2] != "  ")]]


def test_the_tables(plan: Run) -> None:
    ran = plan(LLAMA, "--gpu", "h100", "--context", "2048,8192", "--batch", "1,64")
    assert (ran.status, ran.err) == (0, "")
    assert "8,030,261,248 weights in bfloat16" in ran.out
    assert "989 TFLOP/s in bfloat16 (data sheet)" in ran.out
    memory = {" ".join(cells[:-3]): cells for cells in rows(ran.out, "Memory")}
    assert "weights: mlp" in " ".join(memory)
    assert "11,274,289,152" in ran.out
    assert "KV: 131,072 bytes per token in bfloat16, 8,388,608 per block of 64" in ran.out
    assert [cells[0] for cells in rows(ran.out, "Sequences at once")] == ["context", "2,048", "8,192"]
    decodes = rows(ran.out, "Predicted decode")
    assert [cells[0] for cells in decodes] == ["sequences", "1", "64"]
    assert decodes[-1][-1] == "-"  # 64 times 8,192 tokens do not fit
    assert "upper bounds" in ran.out
    assert max(map(len, ran.out.splitlines()[1:])) <= 120


def test_json_holds_what_the_tables_do(plan: Run, tmp_path: Path) -> None:
    ran = plan(LLAMA, "--gpu", "l40s", "--json", "-")
    record = json.loads(ran.out)
    assert (ran.status, ran.err) == (0, "")
    assert sum(part["num_bytes"] for part in record["memory"]) == record["gpu"]["memory_bytes"] == 46_068 * 2**20
    assert record["fits"] is True
    assert record["settings"]["kv_bytes_per_token"] == 131_072
    assert "not a measurement" in record["predictions"]["what"]
    assert plan(LLAMA, "--gpu", "l40s", "--json", str(tmp_path / "plan.json")).out.startswith(LLAMA)
    assert json.loads((tmp_path / "plan.json").read_text()) == record


@pytest.mark.parametrize(
    "settings",
    [
        ["--dtype", "float32"],
        ["--max-model-len", "131072", "--max-num-seqs", "4", "--no-prefix-caching"],
        ["--kv-cache-tokens", "1000000", "--block-size", "16"],
        ["--max-num-batched-tokens", "1000000"],
        ["--dtype", "float32", "--tokenizer", "/a folder"],
    ],
)
def test_what_does_not_fit_ends_with_commands_that_work(plan: Run, settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text(Path(LLAMA).read_text())
    ran = plan(str(folder / "config.json"), "--gpu", "3090", *settings, "--json", "-")
    assert ran.status == 1
    record = json.loads(ran.out)
    assert record["fits"] is False
    assert ran.err.splitlines()[0] == f"error: {record['reason']}"
    assert record["commands"]
    for command in record["commands"]:
        assert f"  {command}\n" in ran.err
        octavo, verb, model, *words = shlex.split(command)
        assert (octavo, verb, model) == ("octavo", "serve", str(folder))
        assert plan(model, "--gpu", "3090", *words).status == 0
    assert "as it is, it fits on: " in ran.err
    for gpu in record["gpus"][:1]:
        assert plan(str(folder), "--gpu", gpu, *settings).status == 0


def test_what_fits_on_no_cpu_is_not_refused_for_what_a_gpu_is_like(plan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "READ_ROWS", 64)
    monkeypatch.setattr(cpu, "GEMM_ROWS", (8, 64))
    ran = plan(LLAMA, "--gpu", "cpu", "--block-size", "24", "--kv-cache-tokens", "100000000", "--quiet")
    assert ran.status == 1
    assert "as it is" not in ran.err


def test_a_card_that_a_context_fills_has_nothing_left(plan: Run) -> None:
    assert "has 0.00 GiB left" in plan(LLAMA, "--gpu", "memory=100MiB,bandwidth=1TB/s,flops=1TFLOP/s").err


def test_what_fits_nowhere_says_so(plan: Run, tmp_path: Path) -> None:
    huge = json.loads(Path(LLAMA).read_text()) | {"num_hidden_layers": 1000}
    (tmp_path / "config.json").write_text(json.dumps(huge))
    ran = plan(str(tmp_path), "--gpu", "b200")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.endswith("it fits on none of the cards known here; a smaller model would\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([LLAMA, "--gpu", "t4"], "gpu t4 is sm_75; the kernels need sm_80 or newer"),
        ([LLAMA, "--gpu", "h100", "--device", "cpu"], "device is 'cpu' and --gpu is 'h100'; allowed: cuda, or auto"),
        (
            [LLAMA, "--gpu", "h100", "--kv-cache-dtype", "int4"],
            "kv_cache_dtype is 'int4'; allowed: auto, int8, fp8",
        ),
        ([LLAMA, "--gpu", "h100", "--context", "1,x"], "--context is 'x'; allowed: integers above 0"),
        ([LLAMA, "--gpu", "h100", "--batch", "0"], "--batch is '0'; allowed: integers above 0"),
        ([LLAMA, "--gpu", "h100", "--json", "/nowhere/a.json"], "--json /nowhere/a.json: there is no folder /nowhere"),
        ([LLAMA, "--gpu", "h100", "--model", "x"], "the model is given twice"),
        (
            [LLAMA, "--gpu", "h100", "--max-model-len", "200000"],
            "max_model_len is 200000; allowed: at most the model's",
        ),
        (["nothing-there", "--gpu", "h100"], "model is 'nothing-there'; allowed: a bundled name"),
    ],
)
def test_what_cannot_be_planned(plan: Run, words: list[str], said: str) -> None:
    ran = plan(*words)
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err


@pytest.mark.parametrize(("kind", "num_bytes"), [("int8", "67,584"), ("fp8", "65,536")])
def test_keys_and_values_of_fewer_bits(kind: str, num_bytes: str, plan: Run) -> None:
    ran = plan(LLAMA, "--gpu", "h100", "--kv-cache-dtype", kind)
    assert f"KV: {num_bytes} bytes per token in {kind}, " in ran.out
    assert f"bfloat16  {kind}" in next(line for line in ran.out.splitlines() if "<- this plan" in line)


def test_what_does_not_fit_may_fit_in_fewer_bits(plan: Run) -> None:
    words = (LLAMA, "--gpu", "3090", "--max-model-len", "65536")
    ran = plan(*words)
    assert ran.status == 1
    assert "--max-model-len 65536 --kv-cache-dtype fp8" in ran.err or "--kv-cache-dtype fp8" in ran.err
    assert plan(*words, "--kv-cache-dtype", "fp8").status == 0


def test_a_server_s_file_serves_for_a_plan(plan: Run, tmp_path: Path) -> None:
    (tmp_path / "octavo.toml").write_text("max_num_seqs = 7\n[server]\nport = 1234\n")
    ran = plan(LLAMA, "--gpu", "h100", "--config", str(tmp_path / "octavo.toml"), "--json", "-")
    assert json.loads(ran.out)["settings"]["max_num_seqs"] == 7


def test_settings_of_the_file_alone_are_said_and_are_in_no_command(plan: Run, tmp_path: Path) -> None:
    file = tmp_path / "octavo.toml"
    file.write_text("overlap = false\ngraphs = false\nseed = 3\n[faults]\npreempt_every = 5\n")
    found = []
    for words in ([], ["--config", str(file)]):
        choices = json.loads(plan(LLAMA, "--gpu", "h100", *words, "--json", "-").out)["choices"]
        found.append({each["name"]: each["value"] for each in choices if each["name"] in ("overlap", "graphs")})
    assert found == [{"overlap": "true", "graphs": "true"}, {}]
    record = json.loads(plan(LLAMA, "--gpu", "3090", "--dtype", "float32", "--config", str(file), "--json", "-").out)
    assert record["commands"]
    for command in record["commands"]:
        assert plan(LLAMA, "--gpu", "3090", *shlex.split(command)[3:]).status == 0, command


def test_this_cpu_is_measured(plan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "READ_ROWS", 64)
    monkeypatch.setattr(cpu, "GEMM_ROWS", (8, 64))
    ran = plan("smollm2-135m", "--quiet", "--max-num-seqs", "4", "--json", "-")
    assert (ran.status, ran.err) == (0, "")
    record: dict[str, Any] = json.loads(ran.out)
    gpu = Gpu(**record["gpu"])
    assert (gpu.architecture, gpu.source, list(gpu.flops)) == ("cpu", "measured just now", ["float32"])
    assert gpu.bandwidth_bytes_per_s > 1e7
    assert gpu.flops["float32"] > 1e7
    assert {"head, packed" in part["name"] for part in record["memory"]} == {True, False}
    (step,) = (part["note"] for part in record["memory"] if part["name"] == "a step's tensors")
    assert "more on the torch backend" in step
