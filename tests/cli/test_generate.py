"""octavo generate: sources, order, bad lines, errors, output that can be taken up again."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.cli import requests as requests_module
from octavo.engine.cli.batch import run_batch
from octavo.engine.cli.requests import Requests
from octavo.engine.cli.results import ResultFile
from octavo.engine.errors import ConfigError, EngineDeadError
from octavo.engine.llm import LLM

from .conftest import Run

Write = Callable[..., Path]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokens(found: list[dict[str, Any]]) -> dict[Any, list[int]]:
    return {each["id"]: each["outputs"][0]["token_ids"] for each in found}


def test_prompts_as_arguments_become_jsonl_on_a_pipe(generate: Run) -> None:
    ran = generate("Hello", "Once upon", "--temperature", "0", "--logprobs", "2", "--ignore-eos")
    assert ran.status == 0
    assert [each["id"] for each in ran.records] == [1, 2]
    for record, prompt in zip(ran.records, ("Hello", "Once upon"), strict=True):
        (answer,) = record["outputs"]
        assert len(answer["token_ids"]) == 6
        assert answer["finish_reason"] == "length"
        assert [len(each["top_ids"]) for each in answer["logprobs"]] == [2] * 6
        assert [each["top_ids"][0] for each in answer["logprobs"]] == answer["token_ids"]
        assert record["usage"]["prompt_tokens"] == len(prompt)
        assert record["usage"]["completion_tokens"] == 6
        assert record["metrics"]["total_s"] >= record["metrics"]["first_token_s"] > 0


def test_all_sources_say_the_same(generate: Run, write_jsonl: Write, tmp_path: Path) -> None:
    text = tmp_path / "in.txt"
    text.write_bytes("Grüße\n\nB\n".encode())
    lines = write_jsonl([{"id": 1, "prompt": "Grüße"}, {"id": 3, "prompt": "B"}])
    from_text = generate("--input", text, "--temperature", "0")
    from_jsonl = generate("--input", lines, "--temperature", "0")
    assert [each["id"] for each in from_text.records] == [1, 3]
    assert tokens(from_text.records) == tokens(from_jsonl.records)
    assert list(tokens(generate("Grüße", "B", "--temperature", "0").records).values()) == list(
        tokens(from_text.records).values()
    )


def test_a_line_s_own_parameters_go_before_flags(generate: Run, write_jsonl: Write) -> None:
    file = write_jsonl(
        [
            {"id": "own", "prompt": "A", "max_tokens": 3, "n": 2, "ignore_eos": True},
            {"id": "flags", "prompt": "A", "ignore_eos": True},
            {"id": "ids", "prompt_token_ids": [1, 2, 3], "logit_bias": {"7": 100}, "prompt_logprobs": 1},
            {"id": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "ignore_eos": True},
        ]
    )
    own, flags, ids, chat = generate("--input", file).records
    assert [len(each["token_ids"]) for each in own["outputs"]] == [3, 3]
    assert [len(each["token_ids"]) for each in flags["outputs"]] == [6]
    assert ids["outputs"][0]["token_ids"] == [7] * 6
    assert ids["prompt_logprobs"][0] is None
    assert len(ids["prompt_logprobs"]) == 3
    assert chat["usage"]["prompt_tokens"] == len("<user>") - 5 + len("hi\n") + 1


def test_chat_wraps_prompts(generate: Run) -> None:
    plain = generate("hi").records[0]["usage"]["prompt_tokens"]
    chat = generate("hi", "--chat").records[0]["usage"]["prompt_tokens"]
    assert (plain, chat) == (2, len("hi\n") + 2)


def test_order_is_the_input_s_when_later_ones_end_first(generate: Run, write_jsonl: Write) -> None:
    entries = [{"id": str(n), "prompt": "x", "max_tokens": 40 if n % 5 == 0 else 1} for n in range(20)]
    ran = generate("--input", write_jsonl(entries), "--ignore-eos")
    assert [each["id"] for each in ran.records] == [str(n) for n in range(20)]


BAD_LINES = [
    ('{"prompt": "A"', "line 2: is no JSON"),
    ("[1]", "line 2: is no JSON object"),
    ('{"prompt": "A", "prompt": "B"}', "given twice"),
    ('{"prompt": "A", "temperature": NaN}', "NaN is no JSON number"),
    ('{"prompt": "A", "temprature": 1}', "line 2: unknown key 'temprature'"),
    ('{"prompt": "A", "temperature": 3}', "temperature is 3; allowed: a number from 0 to 2"),
    ('{"prompt": "A", "id": "first"}', "id 'first' is that of line 1"),
    ('{"prompt": "A", "id": 1.5}', "id is 1.5"),
    ('{"prompt": "A", "prompt_token_ids": [1]}', "has prompt, prompt_token_ids; allowed: one of"),
    ('{"id": "x"}', "has none; allowed: one of"),
    ('{"prompt": ""}', "prompt is ''"),
    ('{"prompt_token_ids": [264]}', "prompt_token_ids holds 264"),
    ('{"prompt": "A", "max_tokens": 1000}', "max_tokens is 1000"),
    ('{"messages": [{"role": "nobody", "content": ""}]}', "role is 'nobody'"),
    ("[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message[:24] for _, message in BAD_LINES])
def test_a_bad_line_loses_no_other(generate: Run, write_jsonl: Write, line: str, message: str) -> None:
    file = write_jsonl([{"id": "first", "prompt": "A"}, line, {"id": "last", "prompt": "B"}])
    ran = generate("--input", file)
    assert ran.status == 1
    first, bad, last = ran.records
    assert (first["id"], bad["line"], last["id"]) == ("first", 2, "last")
    assert message in bad["error"]
    assert "outputs" in first
    assert "outputs" in last
    assert "1 of 3 requests failed" in ran.err


def test_a_line_that_is_no_text_or_too_long(generate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "MAX_LINE_BYTES", 20)
    file = tmp_path / "in.txt"
    file.write_bytes(b"good\n\xff\xfe\n" + b"long" * 30 + b"\nalso good\n")
    found = generate("--input", file).records
    assert [each["id"] for each in found] == [1, 2, 3, 4]
    assert "not UTF-8" in found[1]["error"]
    assert "at most 20" in found[2]["error"]
    assert "outputs" in found[3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "neither given"),
        (("A", "--input", "x.jsonl"), "both given"),
        (("--input", "missing.jsonl"), "No such file"),
        (("A", "--output", "out.jsonl", "--text"), "--text and --output are both given"),
        (("A", "--text", "--logprobs", "2"), "--text cannot show logprobs; use --jsonl"),
        (("A", "--text", "--no-detokenize"), "--text cannot show no detokenize"),
        (("A", "--output", "/proc/out.jsonl"), "--output /proc/out.jsonl: out.jsonl.settings.json, which is kept"),
        (("--input", "prompts.csv"), "ends in .jsonl or .txt"),
        (("A", "--temperature", "3"), "temperature is 3.0; allowed: a number from 0 to 2"),
        (("A", "--temperature", "nan"), "temperature is nan"),
        (("A", "--logit-bias", "{5: 1}"), "logit_bias is '{5: 1}'"),
        (("A", "--block-size", "0"), "block_size is 0"),
        (("A", "--dtype", "int3"), "dtype is 'int3'; allowed: auto, float32"),
        (("A", "--output", "no/such/folder/out.jsonl"), "there is no folder"),
        (("A", "--max-model-len", "100000"), "max_model_len is 100000; allowed: at most the model's 128"),
        (("A", "--output", "out.jsonl", "--max-model-len", "1000"), "at most the model's 128"),
        (("A", "--kv-cache-tokens", "100000000000"), "try --kv-cache-tokens"),
    ],
)
def test_wrong_use_is_one_short_message(
    generate: Run, words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.csv").write_text("a,b\n")
    ran = generate(*words)
    assert ran.status == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.csv"]


def test_a_file_that_is_no_jsonl_at_all_is_refused_whole(generate: Run, write_jsonl: Write, tmp_path: Path) -> None:
    ran = generate("--input", write_jsonl(["Dear model,", "hello"]), "--output", tmp_path / "out.jsonl")
    assert ran.status == 2
    assert "none of its first 2 lines is a request; line 1: is no JSON" in ran.err
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "out.jsonl.settings.json").exists()


def test_debug_shows_where_an_error_came_from(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_DEBUG", "1")
    with pytest.raises(ConfigError, match="block_size"):
        generate("A", "--block-size", "0")


@pytest.fixture
def ten(write_jsonl: Write) -> Path:
    return write_jsonl([{"id": f"r{n}", "prompt": f"prompt {n % 3}", "ignore_eos": True} for n in range(10)])


def test_a_rerun_answers_what_is_missing_as_one_run_would_have(generate: Run, ten: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert generate("--input", ten, "--output", whole).status == 0
    settings = (tmp_path / "whole.jsonl.settings.json").read_bytes()
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:4]) + lines[4][:25])
    (tmp_path / "cut.jsonl.settings.json").write_bytes(settings)
    assert generate("--input", ten, "--output", cut).status == 0
    # Sampled at temperature 1: the seeds do not depend on how often the run was cut.
    assert tokens(records(cut)) == tokens(records(whole))
    assert [each["id"] for each in records(cut)] == [f"r{n}" for n in range(10)]
    assert cut.read_bytes().splitlines(keepends=True)[:4] == lines[:4]
    assert len({tuple(ids) for ids in tokens(records(whole)).values()}) == 10


def test_a_rerun_with_nothing_left_loads_no_model(
    generate: Run, ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    generate("--input", ten, "--output", out)
    before = out.read_bytes()
    monkeypatch.delattr(LLM, "__init__")
    ran = generate("--input", ten, "--output", out)
    assert ran.status == 0
    assert "has every answer already" in ran.err
    assert out.read_bytes() == before


def test_lines_out_of_order_are_put_in_order(generate: Run, ten: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    generate("--input", ten, "--output", out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[7] + lines[2])
    assert generate("--input", ten, "--output", out).status == 0
    assert [each["id"] for each in records(out)] == [f"r{n}" for n in range(10)]
    assert [line for number, line in enumerate(out.read_bytes().splitlines(keepends=True)) if number in (0, 2, 7)] == [
        lines[0],
        lines[2],
        lines[7],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", "0.5"), '"temperature": 0.5'),
        (("--chat",), "chat was false and is true"),
        (("--dtype", "bfloat16"), 'dtype was "float32" and is "bfloat16"'),
        (("--invariant",), "invariant was false and is true"),
    ],
)
def test_an_output_made_with_other_settings_is_refused(
    generate: Run, ten: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out.jsonl"
    generate("--input", ten, "--output", out)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:3]))
    before = out.read_bytes()
    ran = generate("--input", ten, "--output", out, *words)
    assert ran.status == 2
    assert message in ran.err
    assert "--overwrite" in ran.err
    assert out.read_bytes() == before
    assert generate("--input", ten, "--output", out, *words, "--overwrite").status == 0
    assert len(records(out)) == 10


def test_settings_that_change_no_token_may_differ(generate: Run, ten: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    generate("--input", ten, "--output", out)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:3]))
    assert generate("--input", ten, "--output", out, "--block-size", "16", "--no-prefix-caching").status == 0
    assert len(records(out)) == 10


def test_another_model_is_refused(generate: Run, octavo: Run, ten: Path, tmp_path: Path, model_folder: Path) -> None:
    out = tmp_path / "out.jsonl"
    generate("--input", ten, "--output", out)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:3]))
    other = tmp_path / "other"
    other.mkdir()
    for file in model_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes().replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 1'))
    ran = generate("--input", ten, "--output", out, "--model", other)
    assert ran.status == 2
    assert "model was" in ran.err


def test_another_request_under_an_answered_id_is_refused(generate: Run, write_jsonl: Write, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    generate("--input", write_jsonl([{"id": "a", "prompt": "A"}]), "--output", out)
    ran = generate("--input", write_jsonl([{"id": "a", "prompt": "B"}, {"prompt": "C"}]), "--output", out)
    assert ran.status == 2
    assert "an answer to another request with id 'a' than line 1 now asks" in ran.err


def test_failed_requests_are_run_again(generate: Run, write_jsonl: Write, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    good = {"id": "good", "prompt": "A"}
    file = write_jsonl([{"id": "bad", "prompt": "A", "top_k": 1.5}, good])
    assert generate("--input", file, "--output", out).status == 1
    assert "error" in records(out)[0]
    file = write_jsonl([{"id": "bad", "prompt": "A", "top_k": 15}, good])
    assert generate("--input", file, "--output", out).status == 0
    assert [each["id"] for each in records(out)] == ["bad", "good"]
    assert all("outputs" in each for each in records(out))


@pytest.mark.parametrize(
    "content", [b'{"my": "data"}\n', b"precious notes\n", b'"error"\n', b'{"id": [], "digest": "x"}\n']
)
def test_a_file_of_someone_else_is_left_alone(generate: Run, ten: Path, tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "notes.jsonl"
    out.write_bytes(content)
    ran = generate("--input", ten, "--output", out)
    assert ran.status == 2
    assert "start afresh with --overwrite" in ran.err
    assert out.read_bytes() == content
    # Even where the settings are an earlier run's.
    out.unlink()
    generate("--input", ten, "--output", out)
    out.write_bytes(content)
    ran = generate("--input", ten, "--output", out)
    assert ran.status == 2
    assert "line 1 is not of octavo" in ran.err
    assert out.read_bytes() == content


def test_two_runs_do_not_write_to_one_file(generate: Run, ten: Path, tmp_path: Path) -> None:
    other = ResultFile(tmp_path / "out.jsonl", {}, overwrite=False)
    try:
        ran = generate("--input", ten, "--output", tmp_path / "out.jsonl")
    finally:
        other.close()
    assert ran.status == 2
    assert "another run is writing to it" in ran.err


def test_the_output_may_not_be_the_input(generate: Run, ten: Path) -> None:
    before = ten.read_bytes()
    ran = generate("--input", ten, "--output", ten, "--overwrite")
    assert ran.status == 2
    assert ten.read_bytes() == before


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return `interrupt_after(n)`: Ctrl-C comes during the n-th step."""

    def plan(num_steps: int) -> None:
        step, left = LLM.step, iter(range(num_steps - 1, -1, -1))

        def counted(llm: LLM) -> Any:
            if next(left, None) == 0:
                signal.raise_signal(signal.SIGINT)
            return step(llm)

        monkeypatch.setattr(LLM, "step", counted)

    return plan


def test_ctrl_c_keeps_what_is_finished(
    generate: Run, write_jsonl: Write, tmp_path: Path, interrupt_after: Callable[[int], None]
) -> None:
    lengths = [3, 60, 3, 3, 60, 3]
    file = write_jsonl([{"id": n, "prompt": "x", "max_tokens": m, "ignore_eos": True} for n, m in enumerate(lengths)])
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    handler = signal.getsignal(signal.SIGINT)
    interrupt_after(12)
    ran = generate("--input", file, "--output", out)
    assert ran.status == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert [each["id"] for each in records(out)] == [0, 2, 3]
    assert f"--output {out}" in ran.err.splitlines()[-1]
    assert "3 answers" in ran.err
    assert generate("--input", file, "--output", out).status == 0
    assert generate("--input", file, "--output", whole).status == 0
    assert [each["id"] for each in records(out)] == list(range(6))
    assert tokens(records(out)) == tokens(records(whole))


def test_a_dead_engine_keeps_what_is_finished(
    generate: Run, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, num_steps = LLM.step, iter(range(1000))

    def dying(llm: LLM) -> Any:
        if next(num_steps) == 12:
            raise EngineDeadError("3 steps failed in a row")
        return step(llm)

    monkeypatch.setattr(LLM, "step", dying)
    lengths = [3, 60, 3, 3, 60, 3]
    file = write_jsonl([{"id": n, "prompt": "x", "max_tokens": m, "ignore_eos": True} for n, m in enumerate(lengths)])
    out = tmp_path / "out.jsonl"
    ran = generate("--input", file, "--output", out)
    assert ran.status == 1
    assert "3 steps failed in a row" in ran.err
    assert [each["id"] for each in records(out)] == [0, 2, 3]


def test_a_batch_that_is_stopped_leaves_nothing_running(model_folder: Path) -> None:
    llm = LLM(str(model_folder), load_format="dummy", kv_cache_tokens=1024)
    prompts = Requests([b"A", b"B"], "argument", sampling={"ignore_eos": True}, chat=False, seed=0)
    num_steps = iter(range(10))
    assert list(run_batch(llm, prompts, window=8, should_stop=lambda: next(num_steps) == 3)) == []
    assert llm.stats.num_steps == 3
    assert (llm.stats.num_running, llm.stats.num_waiting) == (0, 0)


def test_an_id_that_cannot_be_encoded_comes_back(generate: Run, write_jsonl: Write) -> None:
    ran = generate("--input", write_jsonl([{"id": "\ud800", "prompt": "A"}]))
    assert ran.records[0]["id"] == "\ud800"


def test_memory_is_bounded_by_the_window(generate: Run, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    add, step = LLM.add, LLM.step
    num_added = 0
    seen: list[int] = []

    def counted(llm: LLM, *arguments: Any, **named: Any) -> str:
        nonlocal num_added
        num_added += 1
        return add(llm, *arguments, **named)

    def noting(llm: LLM) -> Any:
        seen.append(num_added)
        return step(llm)

    monkeypatch.setattr(LLM, "add", counted)
    monkeypatch.setattr(LLM, "step", noting)
    entries = [{"prompt": "x", "max_tokens": 100 if n == 0 else 1, "ignore_eos": True} for n in range(30)]
    assert len(generate("--input", write_jsonl(entries)).records) == 30
    # While the first one, of 100 tokens, is not over, nothing beyond the window of 4 * 2 is taken in.
    assert set(seen[:90]) == {8}


def test_special_tokens_in_prompts_are_refused_where_that_is_asked_for(
    generate: Run, write_jsonl: Callable[..., Path]
) -> None:
    file = write_jsonl([{"prompt": "a<eos>b"}, {"prompt": "fine"}, {"prompt_token_ids": [1, 256]}])
    ran = generate("--input", file, "--no-special-in-prompts")
    assert ran.status == 1
    assert "prompt holds the special token '<eos>'" in ran.err
    assert [record.get("error") is None for record in ran.records] == [False, True, True]
    said = [{"messages": [{"role": "user", "content": "a<eos>b"}]}]
    assert generate("--input", write_jsonl(said), "--no-special-in-prompts").status == 0


def test_a_recording_replays_and_holds_no_prompts(
    generate: Run, octavo: Run, write_jsonl: Write, tmp_path: Path
) -> None:
    recording, shared = tmp_path / "run.json", "a zebra that all of them share, and "
    entries = [{"prompt": f"{shared}{i % 3}", "max_tokens": 8 + i, "n": 1 + i % 2, "seed": i} for i in range(9)]
    words = ("--temperature", "1", "--block-size", "8", "--kv-cache-tokens", "256", "--max-model-len", "128")
    assert len(generate("--input", write_jsonl(entries), "--recording", recording, *words).records) == 9
    files = sorted(path.name for path in tmp_path.iterdir())
    ran = octavo("replay", recording)
    assert ran.status == 0
    assert ran.out.startswith("same schedule: ")
    assert "9 requests" in ran.out
    assert "zebra" not in recording.read_text()
    for place, why in (
        (tmp_path / "no" / "folder.json", "there is no folder"),
        (tmp_path, "is a folder"),
        ("-", "answers go to stdout"),
    ):
        ran = generate("x", "--recording", place)
        assert (ran.status, why in ran.err, ran.out) == (2, True, "")
    both = tmp_path / "both.jsonl"
    ran = generate("x", "--recording", both, "--output", both)
    assert (ran.status, "is the input or the output" in ran.err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == files, "nothing of it is left"
