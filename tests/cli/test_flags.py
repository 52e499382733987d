"""Flags: one for every setting and sampling parameter, octavo.toml beneath them, help without torch."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.cli import flags
from octavo.engine.cli.flags import Options, with_flags
from octavo.engine.config import setting_names
from octavo.engine.errors import RequestError
from octavo.engine.sampling_params import RULES, SamplingParams
from typer import Typer
from typer.testing import CliRunner

from .conftest import Run

FILE_ONLY = {"seed", "graphs", "overlap", "preempt_every", "miss_prefix_cache"}


def options_of(*words: str) -> Options:
    """Return what a verb gets to see of these words."""
    seen: list[Options] = []

    def verb(*, options: Options) -> int:
        """Do nothing."""
        seen.append(options)
        return 0

    app = Typer()
    app.command()(with_flags(verb))
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return seen[0]


def flat(options: Options) -> dict[str, Any]:
    values = {name: getattr(options.config, name) for name, part in setting_names().items() if part == ""}
    for part in ("cache", "scheduler", "faults"):
        values |= dataclasses.asdict(getattr(options.config, part))
    return values


SETTINGS: dict[str, tuple[list[str], Any]] = {
    "model": (["a/b"], "a/b"),
    "tokenizer": (["folder"], "folder"),
    "load_format": (["dummy"], "dummy"),
    "dtype": (["bfloat16"], "bfloat16"),
    "device": (["cpu"], "cpu"),
    "backend": (["torch"], "torch"),
    "invariant": ([], True),
    "generation_config": (["none"], "none"),
    "special_in_prompts": ([], True),
    "block_size": (["16"], 16),
    "kv_cache_tokens": (["640"], 640),
    "kv_cache_dtype": (["fp8"], "fp8"),
    "prefix_caching": ([], True),
    "gpu_memory_utilization": (["0.5"], 0.5),
    "max_num_seqs": (["3"], 3),
    "max_num_batched_tokens": (["7"], 7),
    "max_model_len": (["99"], 99),
    "policy": (["priority"], "priority"),
}


def test_every_setting_but_those_of_the_file_is_tried_here() -> None:
    assert SETTINGS.keys() | FILE_ONLY == setting_names().keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_a_flag(name: str) -> None:
    words, value = SETTINGS[name]
    assert flat(options_of(f"--{name.replace('_', '-')}", *words))[name] == value


def test_switches_can_be_turned_off() -> None:
    assert flat(options_of("--no-prefix-caching"))["prefix_caching"] is False
    assert options_of("--no-skip-special-tokens").sampling == {"skip_special_tokens": False}


SAMPLING: dict[str, tuple[list[str], Any]] = {
    "n": (["--n", "2"], 2),
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_p": (["--top-p", "0.5"], 0.5),
    "top_k": (["--top-k", "5"], 5),
    "min_p": (["--min-p", "0.5"], 0.5),
    "presence_penalty": (["--presence-penalty", "-1"], -1.0),
    "frequency_penalty": (["--frequency-penalty", "1.5"], 1.5),
    "repetition_penalty": (["--repetition-penalty", "1.1"], 1.1),
    "seed": (["--seed", "3"], 3),
    "stop": (["--stop", "a", "--stop", "b"], ("a", "b")),
    "stop_token_ids": (["--stop-token-ids", "1", "--stop-token-ids", "2"], (1, 2)),
    "include_stop_str_in_output": (["--include-stop-str-in-output"], True),
    "ignore_eos": (["--ignore-eos"], True),
    "max_tokens": (["--max-tokens", "9"], 9),
    "min_tokens": (["--min-tokens", "2"], 2),
    "logprobs": (["--logprobs", "0"], 0),
    "prompt_logprobs": (["--prompt-logprobs", "1"], 1),
    "logit_bias": (["--logit-bias", '{"5": -100}'], {5: -100.0}),
    "allowed_token_ids": (["--allowed-token-ids", "1"], (1,)),
    "bad_words": (["--bad-words", "x"], ("x",)),
    "bad_words_token_ids": (["--bad-words-token-ids", "[[1, 2], [3]]"], ((1, 2), (3,))),
    "skip_special_tokens": (["--no-skip-special-tokens"], False),
    "detokenize": (["--no-detokenize"], False),
    "return_hidden_states": (["--return-hidden-states", "0"], (0,)),
    "structured_outputs": (["--structured-outputs", '{"regex": "a+"}'], {"regex": "a+"}),
    "priority": (["--priority", "-3"], -3),
    "cache_salt": (["--cache-salt", "s"], "s"),
}


def test_every_sampling_parameter_is_tried_here() -> None:
    assert SAMPLING.keys() == RULES.keys()


@pytest.mark.parametrize("name", SAMPLING)
def test_every_sampling_parameter_is_a_flag(name: str) -> None:
    words, value = SAMPLING[name]
    options = options_of(*words)
    assert options.sampling.keys() == {name}
    assert getattr(SamplingParams.from_mapping(options.sampling), name) == value
    assert options.config.seed == 0


def test_nothing_given_is_nothing_set() -> None:
    options = options_of()
    assert options.sampling == {}
    assert flat(options)["block_size"] == 64
    assert not options.quiet


def test_every_flag_is_explained(octavo: Run) -> None:
    text = octavo("generate", "--help").out
    for name in (SETTINGS.keys() | RULES.keys()) - FILE_ONLY:
        assert re.search(rf"--(\[no-\])?{name.replace('_', '-')}\b[^\n]*\n?\s+\S", text), name
    for title in ("Sampling:", "Model and device:", "KV cache:", "Scheduling:", "Other:"):
        assert title in text
    assert "--text / --jsonl" in text
    assert "--[no-]chat" in text
    assert "…" not in text
    assert flags.FILE_ONLY == ("seed", "graphs", "overlap")


@pytest.mark.parametrize("words", [["--no-graphs"], ["--overlap=false"], ["--overlap", "--quiet"], ["--seed", "3"]])
def test_settings_without_a_flag_are_named_with_their_place(octavo: Run, words: list[str]) -> None:
    ran = octavo("serve", *words)
    name = words[0].lstrip("-").removeprefix("no-").partition("=")[0]
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {name} has no flag; write {name} = ... in octavo.toml and give --config")
    assert "No such option" in octavo("serve", "--no-such-thing").err


TOML = """\
model = "some/model"
invariant = true
seed = 5
block_size = 16
[scheduler]
max_num_seqs = 4
policy = "priority"
[faults]
preempt_every = 3
[sampling]
temperature = 0.5
stop = ["x"]
"""


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "octavo.toml"
    file.write_text(TOML)
    words = ("--config", str(file), "--max-num-seqs", "8", "--no-invariant", "--temperature", "0", "--block-size", "32")
    options = options_of(*words)
    found = flat(options)
    assert (found["model"], found["max_num_seqs"], found["policy"]) == ("some/model", 8, "priority")
    assert (found["invariant"], found["block_size"], found["seed"], found["preempt_every"]) == (False, 32, 5, 3)
    assert options.sampling == {"temperature": 0.0, "stop": ["x"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "is not valid TOML"),
        ("blok_size = 1", "unknown setting 'blok_size'; allowed: model"),
        ("[cache]\nmax_num_seqs = 1", "unknown setting 'max_num_seqs' in [cache]; allowed: block_size"),
        ("block_size = '16'", "block_size is '16'"),
        ("block_size = 1\n[cache]\nblock_size = 2", "given twice"),
        ("[sampling]\nheat = 1", "unknown parameter 'heat'"),
        ("[sampling]\ntop_p = 2", "top_p is 2"),
        ("sampling = 3", "sampling is no table"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(octavo: Run, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "octavo.toml"
    if text is not None:
        file.write_text(text)
    ran = octavo("generate", "A", "--config", file)
    assert ran.status == 2
    assert f"--config {file}: " in ran.err
    assert message in ran.err


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("stop", "END", "END"), ("stop", '["a", "b"]', ["a", "b"]), ("top_k", "3", 3), ("cache_salt", "5", "5")],
)
def test_parameters_from_text(name: str, text: str, value: Any) -> None:
    assert flags.parameter_from_text(name, text) == value


@pytest.mark.parametrize(("name", "text"), [("top_k", "three"), ("top_k", "3.5"), ("topk", "3"), ("temperature", "9")])
def test_wrong_parameters_from_text(name: str, text: str) -> None:
    with pytest.raises(RequestError, match=name):
        flags.parameter_from_text(name, text)


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from octavo.engine.cli import main; sys.argv = ['octavo', 'generate', '--help']\n"
        "try: main()\n"
        "except SystemExit: print(sorted(set(sys.modules) & set('torch numpy transformers jinja2 tokenizers'.split())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=os.environ
    )
    assert "--kv-cache-tokens" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
