"""`octavo bench throughput`, `latency` and `kernels`: what they run, what they count, what they refuse to tell."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from octavo.engine.cli.progress import GenerationBar
from octavo.engine.llm import LLM
from octavo.engine.step import RequestOutput
from octavo.engine.tools.bench import kernels
from octavo.engine.tools.bench.kernels import CpuClock
from octavo.engine.tools.workload import random_requests
from octavo.kernels import use_backend
from octavo.kernels.dispatch import implementation, override

from .conftest import Ran, Run

ENGINE = ("--load-format", "dummy", "--kv-cache-tokens", "2048", "--block-size", "8", "--max-num-seqs", "4")
WORKLOAD = ("--num-prompts", "5", "--input-len", "12", "--output-len", "6", "--num-rounds", "2")
BATCHES = ("--input-len", "9", "--output-len", "5", "--num-iters", "3", "--num-iters-warmup", "1")


@pytest.fixture(autouse=True)
def _same_backend_after() -> Iterator[None]:
    with use_backend("torch"):
        yield


@pytest.fixture
def throughput(octavo: Run, model_folder: Path) -> Run:
    return lambda *words: octavo("bench", "throughput", model_folder, *ENGINE, *WORKLOAD, "-q", *words)


@pytest.fixture
def latency(octavo: Run, model_folder: Path) -> Run:
    return lambda *words: octavo("bench", "latency", model_folder, *ENGINE, *BATCHES, "-q", *words)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return `interrupted(n)`: press Ctrl-C when so much is over."""

    def after(num: int) -> None:
        over, count = GenerationBar.over, iter(range(1, 1000))

        def counted(bar: GenerationBar) -> None:
            over(bar)
            if next(count) == num:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(GenerationBar, "over", counted)

    return after


def saved(file: Path) -> Any:
    return json.loads(file.read_text())


def test_throughput_counts_every_token_of_every_round(throughput: Run, tmp_path: Path) -> None:
    ran = throughput("--save-result", tmp_path / "a.json")
    assert ran.status == 0, ran.err
    result = saved(tmp_path / "a.json")
    names = ("num_requests", "total_prompt_tokens", "total_output_tokens", "total_num_tokens", "num_rounds")
    assert [result[name] for name in names] == [10, 120, 60, 180, 2]
    assert result["tokens_per_second"] == pytest.approx(180 / result["elapsed_time"])
    assert result["requests_per_second"] == pytest.approx(10 / result["elapsed_time"])
    assert [each["total_output_tokens"] for each in result["rounds"]] == [30, 30]
    assert sum(each["elapsed_time"] for each in result["rounds"]) == pytest.approx(result["elapsed_time"])
    assert (result["num_preemptions"], result["prefix_cache_hits"]) == (0, 0)
    # Before their last step, which frees them, four sequences of 16 tokens hold two blocks of eight; the pool has 256.
    assert result["kv_cache_usage_peak_perc"] == pytest.approx(100 * 8 / 256)
    assert 0 < result["kv_cache_usage_mean_perc"] < result["kv_cache_usage_peak_perc"]
    assert (result["benchmark"], result["engine"]["block_size"], len(result["yardstick_s"])) == ("throughput", 8, 2)
    assert "Total generated tokens:                  60" in ran.out.splitlines()


def test_prompts_that_begin_alike_share_and_a_small_pool_preempts(throughput: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert throughput("--prefix-len", "16", "--save-result", file).status == 0
    # In each of two rounds all but the first find the two blocks that they begin with.
    assert saved(file)["prefix_cache_hits"] == 2 * 4 * 16
    assert throughput("--no-prefix-caching", "--prefix-len", "16", "--save-result", file).status == 0
    assert saved(file)["prefix_cache_hits"] == 0
    small = ("--kv-cache-tokens", "64", "--num-prompts", "4", "--output-len", "24")
    assert throughput(*small, "--save-result", file).status == 0
    assert saved(file)["num_preemptions"] > 0
    assert saved(file)["kv_cache_usage_peak_perc"] == 100


def test_the_same_seed_asks_the_same_and_lengths_are_drawn() -> None:
    def drawn(seed: int) -> list[Any]:
        return random_requests(
            50, seed=seed, input_len=20, output_len=10, range_ratio=0.5, prefix_len=3, vocab_size=100
        )

    requests = drawn(1)
    assert requests == drawn(1) != drawn(2)
    assert {len(each.prompt) - 3 for each in requests} == set(range(10, 31)) & {len(r.prompt) - 3 for r in requests}
    assert min(len(each.prompt) for each in requests) >= 13
    assert len({tuple(each.prompt[:3]) for each in requests}) == 1
    assert all(0 <= token_id < 100 for each in requests for token_id in each.prompt)


def test_prompts_come_from_files(throughput: Run, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    lines = [
        {"prompt": "abcde"},
        {"prompt": [1, 2, 3], "max_tokens": 9},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    file = tmp_path / "a.json"
    ran = throughput("--dataset", "jsonl", "--dataset-path", write_jsonl(lines), "--save-result", file)
    assert ran.status == 0, ran.err
    # The template writes <|user|>, "hi", a newline and <|assistant|>: five tokens.
    assert (saved(file)["total_prompt_tokens"], saved(file)["total_output_tokens"]) == (2 * (5 + 3 + 5), 2 * 21)
    pairs = [["question " * 3, "answer " * 2], ["no", "x"], ["another one", "fine"]]
    shared = [{"conversations": [{"value": value} for value in pair]} for pair in pairs]
    (tmp_path / "s.json").write_text(json.dumps(shared))
    words = ("--dataset", "sharegpt", "--dataset-path", tmp_path / "s.json", "--output-len", "4")
    assert throughput(*words, "--save-result", file).status == 0
    assert (saved(file)["num_requests"], saved(file)["total_prompt_tokens"]) == (4, 2 * (27 + 11))


def test_what_has_changed_is_shown_for_the_same_workload_only(
    octavo: Run, model_folder: Path, throughput: Run, tmp_path: Path
) -> None:
    file = tmp_path / "a.json"
    assert throughput("--save-result", file).status == 0
    ran = throughput("--compare", file)
    assert ran.status == 0, ran.err
    assert ran.out.count("no difference seen") + ran.out.count("higher") + ran.out.count("lower") == 5
    assert "yardstick, ms" in ran.out
    old = saved(file)
    for each in old["rounds"]:
        each.update({name: 1e12 * each[name] for name in each if name.endswith("per_second")})
    file.write_text(json.dumps(old))
    assert throughput("--compare", file).out.count("lower") >= 4
    old["yardstick_s"] = [1e-9, 1.1e-9, 1.05e-9]
    old["machine"]["num_threads"] = 999
    old["engine"]["max_num_seqs"] = 7
    file.write_text(json.dumps(old))
    told = octavo("bench", "throughput", model_folder, *ENGINE, *WORKLOAD, "--compare", file).err
    assert "the machine is not as it was" in told
    assert "measured with another machine: num_threads was 999, is " in told
    assert "measured with other settings: max_num_seqs was 7, is 4" in told
    ran = throughput("--compare", file, "--input-len", "7")
    assert "has no run of this workload: input_len was 12, is 7" in ran.err
    assert "95 % interval" not in ran.out


def test_vllms_result_is_compared_without_an_interval(throughput: Run, tmp_path: Path) -> None:
    names = ("elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second")
    (tmp_path / "a.json").write_text(json.dumps(dict.fromkeys(names, 5.0)))
    ran = throughput("--compare", tmp_path / "a.json")
    assert ran.status == 0, ran.err
    assert [line.split()[0] for line in ran.out.splitlines() if "5.00  " in line and "%" in line] == [
        "requests_per_second",
        "tokens_per_second",
    ]
    assert " to " not in ran.out.split("tokens_per_second")[1].splitlines()[0]


def test_whole_rounds_survive_ctrl_c(throughput: Run, interrupted: Callable[[int], None], tmp_path: Path) -> None:
    interrupted(7)
    ran = throughput("--save-result", tmp_path / "a.json")
    assert (ran.status, saved(tmp_path / "a.json")["num_rounds"]) == (130, 1)
    assert "interrupted: 1 of 2 rounds are over" in ran.err
    interrupted(2)
    ran = throughput("--save-result", tmp_path / "b.json")
    assert (ran.status, ran.out, (tmp_path / "b.json").exists()) == (130, "", False)


def cut_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    step = LLM.step

    def cut(llm: LLM) -> list[RequestOutput]:
        news = step(llm)
        for output in news:
            if output.finished:
                output.outputs[0].token_ids.pop()
        return news

    monkeypatch.setattr(LLM, "step", cut)


def test_no_speed_is_told_of_answers_that_are_cut(
    throughput: Run, latency: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cut_answers(monkeypatch)
    file = tmp_path / "a.json"
    for ran in (throughput("--save-result", file), latency("--batch-size", "2", "--save-result", file)):
        assert (ran.status, ran.out) == (1, "")
        assert "no speed is told" in ran.err
    assert not file.exists()


def test_latency_times_each_batch_size_in_turns(latency: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    ran = latency("--batch-size", "1,3", "--save-result", file)
    assert ran.status == 0, ran.err
    one, three = saved(file)
    assert [(each["batch_size"], each["num_iters"], len(each["latencies"])) for each in (one, three)] == [
        (1, 3, 3),
        (3, 3, 3),
    ]
    assert list(one["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert one["avg_latency"] == pytest.approx(sum(one["latencies"]) / 3)
    for each in (one, three):
        parts = zip(each["latencies"], each["prefill_latencies"], each["per_token_latencies"], strict=True)
        assert all(whole == pytest.approx(prefill + 4 * token) and prefill > 0 for whole, prefill, token in parts)
    assert "Batch size:                              3" in ran.out.splitlines()
    ran = latency("--batch-size", "3", "--compare", file)
    assert ("per_token_latency_ms" in ran.out, ran.status) == (True, 0)
    assert "batch_size was 1, is 2" in latency("--batch-size", "2", "--compare", file).err


def test_a_batch_is_prefilled_when_its_last_prompt_is(
    latency: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, step, steps = tmp_path / "a.json", LLM.step, [0]

    def counted(llm: LLM) -> list[RequestOutput]:
        steps[0] += 1
        return step(llm)

    monkeypatch.setattr(LLM, "step", counted)
    monkeypatch.setattr("octavo.engine.tools.bench.latency.time", SimpleNamespace(monotonic=lambda: float(steps[0])))
    # Four tokens a step: the third prompt begins long after the first has a token, and has its own a step before all
    # is over.
    small = ("--max-num-batched-tokens", "4", "--input-len", "30", "--output-len", "2")
    assert latency(*small, "--batch-size", "3", "--save-result", file).status == 0
    result = saved(file)
    assert result["prefill_latencies"] == [result["prefill_latencies"][0]] * 3
    assert result["prefill_latencies"][0] >= 90 / 4
    assert result["per_token_latencies"] == [1.0] * 3


def test_one_token_has_no_time_between(latency: Run, tmp_path: Path) -> None:
    ran = latency("--output-len", "1", "--batch-size", "4", "--save-result", tmp_path / "a.json")
    assert ran.status == 0, ran.err
    result = saved(tmp_path / "a.json")
    assert (result["batch_size"], result["avg_per_token_latency"]) == (4, None)
    assert "excl. 1st" not in ran.out


def test_batches_survive_ctrl_c(latency: Run, interrupted: Callable[[int], None], tmp_path: Path) -> None:
    interrupted(5)
    ran = latency("--batch-size", "1,2", "--save-result", tmp_path / "a.json")
    assert ran.status == 130
    assert [each["num_iters"] for each in saved(tmp_path / "a.json")] == [2, 1]
    assert "interrupted: 3 of 6 batches are over" in ran.err


class Numbers(CpuClock):
    """A clock that knows what it will say."""

    def samples(self, call: Callable[[], object]) -> list[float]:
        call()
        return [0.002]


@pytest.fixture
def ops(octavo: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(kernels, "best_clock", Numbers)
    words = (
        "bench",
        "kernels",
        "--backend",
        "torch",
        "--op",
        "gated_activation,ungated_activation",
        "--num-rounds",
        "3",
    )
    return lambda *more: octavo(*words, *more)


def test_kernels_are_timed_checked_and_compared(ops: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    ran = ops("--save-result", file)
    assert ran.status == 0, ran.err
    assert "2 cases, 3 rounds, backend torch on cpu" in ran.err
    result = saved(file)
    gated = result["cases"][0]
    assert (gated["op"], gated["case"], gated["dtype"], gated["us"]) == (
        "gated_activation",
        "llama-8b",
        "bfloat16",
        2e3,
    )
    assert gated["gb_per_s"] == pytest.approx(3 * 64 * 14336 * 2 / 0.002 / 1e9)
    assert 0 < gated["error_u"] <= 1
    assert "gated_activation/llama-8b, bfloat16" in ran.out
    result["cases"][0]["round_us"] = [1000.0, 1001.0, 1002.0]
    del result["cases"][1]
    file.write_text(json.dumps(result))
    ran = ops("--compare", file)
    assert ran.status == 0, ran.err
    assert "+99.8%" in ran.out
    assert "lacks ungated_activation/llama-8b, bfloat16" in ran.err


def test_a_wrong_kernel_has_no_figure(ops: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = implementation("gated_activation", "torch")

    def wrong(*arguments: Any, **options: Any) -> Any:
        return right(*arguments, **options) * 1.02

    # `use_backend` empties the table of what is in force, so it is planted where that is filled from.
    monkeypatch.setattr("octavo.kernels.activation.reference.gated_activation", wrong)
    monkeypatch.setattr("octavo.engine.tools.bench.checking.use_backend", lambda _: override("gated_activation", right))
    ran = ops("--save-result", tmp_path / "a.json")
    assert ran.status == 1
    assert "gated_activation/llama-8b: result 0 is off by" in ran.err
    assert [each["op"] for each in saved(tmp_path / "a.json")["cases"]] == ["ungated_activation"]


def test_timings_survive_ctrl_c(ops: Run, interrupted: Callable[[int], None], tmp_path: Path) -> None:
    interrupted(5)
    ran = ops("--save-result", tmp_path / "a.json")
    assert ran.status == 130
    assert [len(each["round_us"]) for each in saved(tmp_path / "a.json")["cases"]] == [2, 1]
    assert "interrupted: 3 of 6 timings are over" in ran.err


REFUSED = [
    (("throughput", "--num-prompts", "0"), "--num-prompts is 0"),
    (("throughput", "--num-rounds", "0"), "--num-rounds is 0"),
    (("throughput", "--dataset", "sharegpt"), "--dataset sharegpt needs a --dataset-path"),
    (("throughput", "--temperature", "nan"), "--temperature is nan"),
    (("throughput", "--compare", "/nowhere/a.json"), "--compare /nowhere/a.json"),
    (("throughput", "a", "--model", "b"), "the model is given twice: 'a', and 'b'"),
    (("latency", "--batch-size", "0"), "--batch-size is '0'"),
    (("latency", "--num-iters", "0"), "--num-iters is 0"),
    (("latency", "--save-result", "/nowhere/a.json"), "there is no folder /nowhere"),
    (("kernels", "--op", "norm"), "--op is 'norm'; allowed: gated_activation"),
    (("kernels", "--dtype", "int8"), "--dtype is 'int8'; allowed: float32, float16, bfloat16"),
    (("kernels", "--backend", "cuda"), "--backend is 'cuda'"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda each: " ".join(each) if each else None)
def test_what_cannot_be_is_refused(octavo: Run, words: tuple[str, ...], message: str) -> None:
    ran = octavo("bench", *words)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err


def test_what_would_not_run_as_asked_is_refused(throughput: Run, latency: Run) -> None:
    def refusal(*words: str) -> Ran:
        ran = latency(*words)
        assert (ran.status, ran.out) == (2, "")
        return ran

    assert "allowed: at most 4, see --max-num-seqs" in refusal("--batch-size", "5").err
    assert "prompt has 200 tokens" in throughput("--input-len", "200").err
    small = ("--batch-size", "4", "--kv-cache-tokens", "40", "--max-model-len", "20")
    assert "14 tokens each need 8 blocks of 8; allowed: at most 5" in refusal(*small).err


def test_a_file_that_is_no_result_is_refused(throughput: Run, latency: Run, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"elapsed_time": 1}]')
    missing = "is no result of bench throughput (without requests_per_second, tokens_per_second)"
    assert missing in throughput("--compare", tmp_path / "a.json").err
    (tmp_path / "a.json").write_text("{")
    assert "is no JSON" in latency("--compare", tmp_path / "a.json").err


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens_per_second": "fast", "rounds": []},
        {"rounds": 5},
        {"rounds": [{"tokens_per_second": -4.0}]},
        {"rounds": [{"tokens_per_second": 1e999}]},
        {"yardstick_s": [0.0]},
        {"machine": "mine"},
        None,
    ],
)
def test_a_damaged_result_is_refused_before_anything_runs(
    throughput: Run, tmp_path: Path, changed: dict[str, Any] | None
) -> None:
    good = {"elapsed_time": 1.0, "requests_per_second": 2.0, "tokens_per_second": 3.0}
    (tmp_path / "a.json").write_text("[]" if changed is None else json.dumps(good | changed))
    ran = throughput("--compare", tmp_path / "a.json")
    assert (ran.status, ran.out) == (2, "")
    assert ("an empty list" if changed is None else "is a damaged result") in ran.err


def test_settings_of_requests_are_refused_by_name(throughput: Run, tmp_path: Path) -> None:
    (tmp_path / "octavo.toml").write_text("[sampling]\ntop_p = 0.5\n[server]\nport = 1\n")
    ran = throughput("--config", tmp_path / "octavo.toml")
    assert (ran.status, "[sampling] holds top_p" in ran.err) == (2, True)


def test_the_interpreter_is_not_timed(octavo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ran = octavo("bench", "kernels", "--backend", "triton", "--op", "rms_norm")
    assert (ran.status, ran.out) == (2, "")
    assert "says nothing of the kernels" in ran.err
