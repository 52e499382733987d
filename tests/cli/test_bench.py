"""`octavo bench serve`: what it sends, what it counts, what it refuses to tell."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.tools.bench.comparison import _Resampled
from octavo.engine.tools.load import Load, Measured, arrival_times
from octavo.engine.tools.serving_comparison import differences
from octavo.engine.tools.serving_result import PerRequest, serving_result
from octavo.engine.tools.stream_client import Answer, ServerError, StreamClient, _Events
from octavo.engine.tools.workload import WORDS, LoadRequest, random_requests, sharegpt_requests

from .conftest import Run
from .stand_in import DONE, StandIn, answer, chunk, stand_in, usage

SMALL = ("--num-prompts", "6", "--input-len", "5", "--output-len", "4", "--quiet")


@pytest.fixture(scope="module")
def running() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def server(running: StandIn) -> StandIn:
    running.reply, running.delay_s = answer, 0.0
    running.bodies.clear()
    running.max_open = 0
    return running


@pytest.fixture
def measure(octavo: Run, server: StandIn) -> Callable[..., Any]:
    return lambda *words: octavo("bench", "serve", "--base-url", server.url, *SMALL, *words)


def test_a_closed_loop_keeps_so_many_requests_under_way_and_counts_all(
    measure: Run, server: StandIn, tmp_path: Path
) -> None:
    server.delay_s = 0.001
    file = tmp_path / "a.json"
    ran = measure("--max-concurrency", "2", "--save-result", file, "--ignore-eos")
    assert ran.status == 0, ran.err
    assert server.max_open == 2
    assert len(server.bodies) == 6
    body = server.bodies[0]
    assert body["stream_options"] == {"include_usage": True}
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == ("stand-in", 4, True, 0.0)
    result = json.loads(file.read_text())
    names = ("completed", "failed", "total_input_tokens", "total_output_tokens", "num_prompts", "max_concurrency")
    assert [result[name] for name in names] == [6, 0, 30, 24, 6, 2]
    assert result["request_throughput"] == pytest.approx(6 / result["duration"])
    assert result["total_token_throughput"] == pytest.approx(54 / result["duration"])
    assert [len(each) for each in result["itls"]] == [3] * 6
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert all(result[f"{statistic}_{metric}_ms"] > 0 for statistic in ("mean", "median", "std", "p99"))
    for line in ("Successful requests:                     6", "Total generated tokens:                  24"):
        assert line in ran.out.splitlines()
    assert f"Median TTFT (ms):                        {result['median_ttft_ms']:.2f}" in ran.out


def test_connections_are_used_again(measure: Run, server: StandIn) -> None:
    before = server.num_connections
    assert measure("--max-concurrency", "1").status == 0
    assert server.num_connections == before + 1


def test_rates_make_a_run_each_with_prompts_of_their_own(measure: Run, server: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    ran = measure("--request-rate", "200,inf", "--max-concurrency", "3", "--save-result", file)
    assert ran.status == 0, ran.err
    results = json.loads(file.read_text())
    assert [result["request_rate"] for result in results] == [200.0, "inf"]
    assert results[0]["duration"] >= 6 / 200
    assert len({body["prompt"] for body in server.bodies}) == 12
    again = measure("--request-rate", "inf", "--max-concurrency", "3", "--compare", file)
    assert "median_ttft_ms" in again.out
    assert "has no run of this rate" in measure("--compare", file).err


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5), (math.inf, 0.0)])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(burstiness: float, variation: float) -> None:
    load = Load(50.0, burstiness, seed=3)
    times = arrival_times(20_000, load)
    gaps = np.diff(times, prepend=0.0)
    assert times[-1] == pytest.approx(20_000 / 50.0)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, abs=0.08)
    assert (times == arrival_times(20_000, load)).all()
    assert not arrival_times(5, Load()).any()


def answer_at(start_s: float, *pieces_s: float, told: int | None = None, error: str = "") -> Answer:
    made = Answer(start_s, list(pieces_s), pieces_s[-1] if pieces_s else start_s, "stop", 10, told, None, error)
    made.is_over = True
    return made


ANSWERS = [
    answer_at(0.0, 0.1, 0.2, 0.4, told=3),
    answer_at(1.0, 1.3, 1.5, told=5),
    answer_at(1.2, 1.3, told=1),
    answer_at(5.0, error="refused"),
]


def figures(**goodput: float) -> dict[str, Any]:
    measured = Measured(ANSWERS, [0.0] * 4, [0.0, 0.0, 0.0, 0.1], 2.0, 0.5)
    return serving_result([LoadRequest("x", 8)] * 4, measured, Load(), goodput=goodput)


def test_figures_are_those_of_the_definitions() -> None:
    result = figures()
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (3, 1, 9)
    assert (result["output_throughput"], result["total_input_tokens"]) == (4.5, 30)
    assert result["mean_ttft_ms"] == pytest.approx(1000 * (0.1 + 0.3 + 0.1) / 3)
    assert result["median_ttft_ms"] == pytest.approx(100)
    assert result["mean_tpot_ms"] == pytest.approx(1000 * (0.3 / 2 + 0.2 / 4) / 2)
    assert result["mean_itl_ms"] == pytest.approx(1000 * (0.1 + 0.2 + 0.2) / 3)
    assert result["p99_e2el_ms"] == pytest.approx(1000 * np.percentile([0.4, 0.5, 0.1], 99))
    assert result["max_concurrent_requests"] == 2
    assert result["max_output_tokens_per_s"] == 6
    assert result["ttfts"][3] == 0.0
    assert result["errors"] == ["", "", "", "refused"]


@pytest.mark.parametrize(
    ("goodput", "num_good"),
    [({"ttft": 150}, 2), ({"ttft": 150, "tpot": 100}, 1), ({"tpot": 60}, 2), ({"e2el": 450}, 2), ({"e2el": 50}, 0)],
)
def test_goodput_counts_requests_that_meet_every_objective(goodput: dict[str, float], num_good: int) -> None:
    assert figures(**goodput)["request_goodput"] == pytest.approx(num_good / 2.0)


def test_goodput_takes_the_words_that_follow_as_others_do(measure: Run) -> None:
    ran = measure("--goodput", "ttft:60000", "tpot:60000")
    assert ran.status == 0, ran.err
    assert "Request goodput (req/s):" in ran.out
    assert "tpto:1" in measure("--goodput", "ttft:200", "tpto:1").err


Pieces = Callable[[Mapping[str, Any]], Any]
FAILURES: dict[str, tuple[Pieces, str]] = {
    "refused": (lambda body: (429, {"error": {"message": "the queue is full"}}), "status 429: the queue is full"),
    "not OpenAI's form": (lambda body: (500, ["oops"]), 'status 500: ["oops"]'),
    "cut off": (lambda body: [chunk("a"), chunk("b")], "the stream ended without [DONE]"),
    "an error midway": (
        lambda body: [chunk("a"), b'data: {"error": {"message": "logits are not finite"}}\n\n', DONE],
        "logits are not finite",
    ),
    "no JSON": (lambda body: [b"data: {]\n\n", DONE], "no chunk of an answer"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failed_requests_are_counted_and_one_is_shown(measure: Run, server: StandIn, name: str) -> None:
    failure, message = FAILURES[name]
    server.reply = lambda body: failure(body) if len(server.bodies) % 3 == 0 else answer(body)
    ran = measure("--max-concurrency", "1")
    assert ran.status == 1
    assert message in ran.err
    assert "2 of 6 requests failed" in ran.err
    assert "Failed requests:                         2" in ran.out
    server.reply = failure
    ran = measure()
    assert (ran.status, ran.out) == (1, "")


def pieces_of(num: int, finish: str | None = "length") -> list[bytes]:
    return [*(chunk("a") for _ in range(num)), chunk("", finish)]


WRONG: dict[str, tuple[list[bytes], str]] = {
    "more than asked for": ([*pieces_of(2), usage(5, 9), DONE], "asked for at most 4 tokens, usage says 9"),
    "less than ignore_eos": ([*pieces_of(3, "stop"), usage(5, 3), DONE], "asked for exactly 4 tokens, usage says 3"),
    "more pieces than tokens": ([*pieces_of(4), usage(5, 2), DONE], "came in 4 pieces of text, usage says 2"),
    "no finish_reason": ([*pieces_of(4, None), usage(5, 4), DONE], "has no finish_reason"),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_speed_is_told_of_wrong_answers(measure: Run, server: StandIn, tmp_path: Path, name: str) -> None:
    pieces, message = WRONG[name]
    server.reply = lambda body: pieces if len(server.bodies) == 4 else answer(body)
    ran = measure("--ignore-eos", "--save-result", tmp_path / "a.json")
    assert (ran.status, ran.out) == (1, "")
    assert "1 answers are wrong, so no speed is told" in ran.err
    assert message in ran.err
    assert not (tmp_path / "a.json").exists()


def test_a_server_without_usage_has_its_chunks_counted(measure: Run, server: StandIn, tmp_path: Path) -> None:
    server.reply = lambda body: [*pieces_of(3, "stop"), DONE]
    assert measure("--save-result", tmp_path / "a.json").status == 0
    assert json.loads((tmp_path / "a.json").read_text())["total_output_tokens"] == 18


def test_prompts_that_the_server_had_cached_are_pointed_out(octavo: Run, server: StandIn) -> None:
    server.reply = lambda body: [*pieces_of(4), usage(10, 4, 9), DONE]
    ran = octavo("bench", "serve", "--base-url", server.url, *SMALL[:-1])
    assert "90% of the prompt tokens were in the server's cache; draw others with --seed" in ran.err
    assert "Cached input tokens:                     54" in ran.out


def test_no_server_is_said_at_once(octavo: Run) -> None:
    ran = octavo("bench", "serve", "--base-url", "http://127.0.0.1:1")
    assert ran.status == 2
    assert "127.0.0.1:1" in ran.err
    assert "octavo serve" in ran.err


def test_the_key_is_sent_and_never_shown(
    measure: Run, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("sk-secret-1\n")
    ran = measure("--api-key-file", tmp_path / "key", "--save-result", tmp_path / "a.json")
    assert server.headers["authorization"] == "Bearer sk-secret-1"
    assert "secret" not in ran.out + ran.err + (tmp_path / "a.json").read_text()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-2")
    measure()
    assert server.headers["authorization"] == "Bearer sk-secret-2"


def test_a_chat_is_asked_for_as_one(measure: Run, server: StandIn) -> None:
    assert measure("--endpoint", "chat", "--extra-body", '{"top_p": 0.5, "temperature": 1}').status == 0
    body = server.bodies[0]
    assert [message["role"] for message in body["messages"]] == ["user"]
    assert (body["top_p"], body["temperature"]) == (0.5, 1)


def test_jsonl_says_prompts_and_lengths(measure: Run, server: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"prompt": "a b", "max_tokens": 2}\n\n{"prompt": [5, 6, 7]}\n{"prompt": "c", "output_tokens": 1}\n'
    )
    assert measure("--dataset", "jsonl", "--dataset-path", file, "--max-concurrency", "1").status == 0
    assert [(body["prompt"], body["max_tokens"]) for body in server.bodies] == [("a b", 2), ([5, 6, 7], 4), ("c", 1)]
    file.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert measure("--dataset", "jsonl", "--dataset-path", file, "--endpoint", "chat").status == 0
    assert "use --endpoint chat" in measure("--dataset", "jsonl", "--dataset-path", file).err
    for line, message in (
        ('{"prompt": "a", "max_token": 3}', "line 1: unknown key 'max_token'"),
        ('{"prompt": "a", "messages": []}', "either prompt or messages"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        ('{"prompt": ""}', "line 1"),
        ("{", "line 1"),
        ("", "no request that fits"),
    ):
        file.write_text(line)
        ran = measure("--dataset", "jsonl", "--dataset-path", file)
        assert ran.status == 2
        assert message in ran.err


def test_sharegpt_takes_first_questions_and_the_length_of_their_answers(
    measure: Run, server: StandIn, tmp_path: Path
) -> None:
    def turns(*texts: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    file = tmp_path / "a.json"
    usable = [turns(f"{index} one two three", "four words of answer " * 2, "more") for index in range(3)]
    file.write_text(json.dumps([*usable, turns("alone"), turns("short", "a b c d e"), turns("w " * 1025, "a b c d e")]))
    words = ("--dataset", "sharegpt", "--dataset-path", file)
    assert measure(*words).status == 0
    assert {body["prompt"] for body in server.bodies} == {turn["conversations"][0]["value"] for turn in usable}

    async def count(text: str) -> int:
        return len(text.split())

    drawn = asyncio.run(sharegpt_requests(file, 2, seed=1, output_len=None, count_tokens=count))
    assert [request.max_tokens for request in drawn] == [8, 8]
    file.write_text('{"a": 1}')
    assert "is no ShareGPT file" in measure(*words).err


def test_random_prompts_have_the_lengths_asked_for() -> None:
    requests = random_requests(400, seed=5, input_len=20, output_len=10, range_ratio=0.5, prefix_len=7)
    lengths = [len(request.prompt.split()) - 7 for request in requests if isinstance(request.prompt, str)]
    assert (min(lengths), max(lengths)) == (10, 30)
    assert {request.max_tokens for request in requests} == set(range(5, 16))
    assert len({" ".join(str(request.prompt).split()[:7]) for request in requests}) == 1
    assert requests == random_requests(400, seed=5, input_len=20, output_len=10, range_ratio=0.5, prefix_len=7)
    assert requests != random_requests(400, seed=6, input_len=20, output_len=10, range_ratio=0.5, prefix_len=7)


def test_words_of_random_prompts_are_tokens_of_a_real_tokenizer() -> None:
    from octavo.engine.loader import resolve_model
    from octavo.engine.text.tokenizer import Tokenizer

    metadata = resolve_model("smollm2-135m").tokenizer_metadata
    assert metadata is not None
    tokenizer = Tokenizer.from_gguf(metadata, file="smollm2-135m")
    assert len(tokenizer.encode(" ".join(WORDS))) == len(WORDS)


REFUSED = [
    (("--num-prompts", "0"), "--num-prompts is 0"),
    (("--range-ratio", "nan"), "--range-ratio is nan"),
    (("--burstiness", "0"), "--burstiness is 0.0"),
    (("--timeout", "inf"), "--timeout is inf"),
    (("--request-rate", "1,0"), "--request-rate is '0'"),
    (("--request-rate", "nan"), "--request-rate is 'nan'"),
    (("--max-concurrency", "1.5"), "--max-concurrency is '1.5'"),
    (("--endpoint", "embeddings"), "--endpoint is 'embeddings'; allowed: completions, chat"),
    (("--dataset", "jsonl"), "--dataset jsonl needs a --dataset-path"),
    (("--dataset-path", "x"), "--dataset random takes no --dataset-path"),
    (("--goodput", "ttft:-1"), "--goodput is 'ttft:-1'"),
    (("--extra-body", "[]"), "--extra-body is a list"),
    (("--extra-body", "{"), "--extra-body: "),
    (("--base-url", "ftp://x"), "--base-url is 'ftp://x'"),
    (("--base-url", "http://x:port"), "--base-url is"),
    (("--save-result", "/nowhere/a.json"), "there is no folder /nowhere"),
    (("--compare", "/nowhere/a.json"), "--compare /nowhere/a.json"),
    (("--api-key-file", "/nowhere/key"), "--api-key-file /nowhere/key cannot be read"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda each: " ".join(each) if each else None)
def test_what_cannot_be_is_refused(octavo: Run, words: tuple[str, ...], message: str) -> None:
    ran = octavo("bench", "serve", *words)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err


@given(st.lists(st.integers(0, 400), max_size=12), st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_read_however_the_bytes_are_cut(cuts: list[int], newline: bytes) -> None:
    sent = b"".join([b": ping\n\n", chunk("é"), *pieces_of(2, "stop"), usage(5, 3, 1), DONE]).replace(b"\n", newline)
    made = Answer()
    events = _Events(made)
    places = sorted({0, len(sent), *(cut for cut in cuts if cut < len(sent))})
    for start, end in pairwise(places):
        events.receive(sent[start:end])
    assert events.is_done
    assert (made.error, made.finish_reason, len(made.piece_times_s)) == ("", "stop", 3)
    assert (made.num_prompt_tokens, made.num_output_tokens, made.num_cached_tokens) == (5, 3, 1)


def test_a_connection_that_was_closed_meanwhile_is_replaced(server: StandIn) -> None:
    async def ask() -> None:
        async with StreamClient(server.url) as client:
            await client.json("/v1/models")
            server.hangs_up = True
            assert (await client.json("/v1/models"))["data"]

    before = server.num_connections
    asyncio.run(ask())
    assert server.num_connections == before + 2


def test_an_answer_that_never_ends_is_given_up(server: StandIn) -> None:
    server.delay_s = 3600.0
    body = {"prompt": "a", "max_tokens": 1}

    async def ask() -> Answer:
        made = Answer()
        async with StreamClient(server.url, timeout_s=0.05) as client:
            await client.stream("/v1/completions", body, made)
        async with StreamClient(server.url) as client:
            server.reply = lambda body: (404, {"error": {"message": "no such thing"}})
            with pytest.raises(ServerError, match="status 404: no such thing"):
                await client.json("/v1/completions", body)
        return made

    made = asyncio.run(ask())
    assert (made.error, made.is_over) == ("no complete answer within 0.05 s", True)


def result_of(rng: np.random.Generator, slowdown: float = 1.0, num: int = 240) -> dict[str, Any]:
    """A result as vLLM saves it."""
    itls = slowdown * rng.gamma(20, 0.0005, (num, 15))
    return {
        "request_rate": "inf",
        "request_throughput": 10.0 / slowdown,
        "output_throughput": 160.0 / slowdown,
        "total_token_throughput": 320.0 / slowdown,
        "ttfts": (slowdown * rng.gamma(9, 0.005, num)).tolist(),
        "itls": itls.tolist(),
        "output_lens": [16] * num,
        "errors": [""] * num,
    }


def test_a_comparison_sees_what_is_there_and_nothing_where_there_is_nothing(measure: Run, tmp_path: Path) -> None:
    old = result_of(np.random.default_rng(1))
    same = {each.name: each for each in differences(old, result_of(np.random.default_rng(2)))}
    slower = {each.name: each for each in differences(old, result_of(np.random.default_rng(3), 1.3))}
    timed = [name for name in same if name.endswith("_ms")]
    assert len(timed) == 8
    assert [same[name].verdict for name in timed] == ["no difference seen"] * 8
    assert [slower[name].verdict for name in timed] == ["higher"] * 8
    assert [same[name].verdict for name in same if name not in timed] == [""] * 3
    for name in timed:
        low, high = slower[name].low, slower[name].high
        assert low is not None
        assert high is not None
        assert low < 0.3 < high
    (tmp_path / "a.json").write_text(json.dumps(old))
    ran = measure("--compare", tmp_path / "a.json")
    assert ran.status == 0, ran.err
    assert "lower" in ran.out
    (tmp_path / "a.json").write_text('{"ttfts": []}')
    assert "is no result of bench serve with its raw values" in measure("--compare", tmp_path / "a.json").err


def test_drawn_statistics_equal_those_of_the_drawn_values() -> None:
    rng = np.random.default_rng(0)
    values = [rng.random(rng.integers(0, 5)).tolist() for _ in range(9)]
    resampled = _Resampled(values, rng)
    for _ in range(50):
        times = rng.multinomial(9, np.full(9, 1 / 9))
        drawn = [value for block, count in enumerate(times) for _ in range(count) for value in values[block]]
        assert resampled._drawn(times) == pytest.approx((np.mean(drawn), np.median(drawn)))


def test_results_without_raw_values_are_refused() -> None:
    with pytest.raises(KeyError):
        PerRequest.of({"ttfts": []})
