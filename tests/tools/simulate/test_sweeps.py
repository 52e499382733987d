"""Sweeps, and `octavo simulate`: grids, processes, going on after an end, pages, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.config import EngineConfig, ModelConfig, RopeConfig
from octavo.engine.errors import ConfigError, OctavoError
from octavo.engine.tools.gpus import find_gpu
from octavo.engine.tools.simulate.cost import LinearCost, write_cost
from octavo.engine.tools.simulate.page import point_name, simulation_page, sweep_lines
from octavo.engine.tools.simulate.sweep import (
    Scenario,
    Simulated,
    append_finished,
    parse_sweeps,
    points_of,
    read_finished,
    run_points,
)

from ...cli.conftest import Run, model_folder, octavo
from .loads import draw

__all__ = ["model_folder", "octavo"]

MODEL = ModelConfig("llama", 300, 32, 40, 2, 4, 2, 8, 512, rope=RopeConfig(1e4, 8))
SCENARIO = Scenario(
    draw(40, 20.0),
    MODEL,
    EngineConfig.from_settings({"block_size": 16, "kv_cache_tokens": 1024, "max_num_seqs": 8}),
    cost=LinearCost((2e-3, 1e-4, 0, 0, 0, 0)),
    goodput={"ttft": 40.0},
)
SWEEPS = ("max_num_batched_tokens=16,64", "prefix_caching=true,false")


def run_all(scenario: Scenario, points: list[Any], jobs: int) -> list[Simulated]:
    told: list[int] = []
    found = dict(run_points(scenario, dict(enumerate(points)), jobs, told.append))
    assert all(num <= len(points) * len(scenario.workload) for num in told)
    return [Simulated(point, found[place]) for place, point in enumerate(points)]


@pytest.fixture(scope="module")
def runs() -> list[Simulated]:
    return run_all(SCENARIO, points_of(parse_sweeps(SWEEPS)), 1)


def test_a_grid_has_every_pair_of_values_and_each_is_honoured(runs: list[Simulated]) -> None:
    assert [tuple(run.point.values()) for run in runs] == [(16, True), (16, False), (64, True), (64, False)]
    for point, result in runs:
        assert result["engine"]["max_num_batched_tokens"] == point["max_num_batched_tokens"]
        assert (result["prefix_hit_rate"] > 0) <= point["prefix_caching"]
        assert result["completed"] == 40
    assert runs[0].result["mean_ttft_ms"] > runs[2].result["mean_ttft_ms"]
    rates = run_all(SCENARIO, points_of(parse_sweeps(["request_rate=2,inf"])), 1)
    assert rates[0].result["duration"] > 15 > rates[1].result["duration"]
    cards = points_of(parse_sweeps(["gpu=h100,L40S", "dtype=float32"]))
    h100, l40s = run_all(replace(SCENARIO, cost=None, gpu=find_gpu("h100")), cards, 1)
    assert h100.result["mean_tpot_ms"] < l40s.result["mean_tpot_ms"]
    assert h100.result["engine"]["dtype"] == "float32"
    slow = replace(SCENARIO, cost=None, gpu=find_gpu("h100"), efficiency=0.5, overhead_s=0.001).run()
    assert slow["mean_tpot_ms"] == pytest.approx(
        2 * replace(SCENARIO, cost=None, gpu=find_gpu("h100")).run()["mean_tpot_ms"] + 1, rel=0.1
    )


def test_processes_find_the_same(runs: list[Simulated]) -> None:
    assert run_all(SCENARIO, [run.point for run in runs], 2) == runs


def test_a_mistake_in_a_process_is_told_here() -> None:
    points = [{"kv_cache_tokens": 512}, {"kv_cache_tokens": 1 << 40}]
    with pytest.raises(OctavoError, match="a KV pool of 1,099,511,627,776 tokens"):
        run_all(SCENARIO, points, 2)


def test_a_sweep_goes_on_where_it_was_stopped(runs: list[Simulated], tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    points = [run.point for run in runs]
    assert read_finished(file, SCENARIO, points) == {}
    for run in runs[:2]:
        append_finished(file, SCENARIO, run)
    with file.open("a") as stream:
        stream.write('{"octavo_simulation": 1, "key": "ab')
    assert read_finished(file, SCENARIO, points) == {0: runs[0].result, 1: runs[1].result}
    append_finished(file, SCENARIO, runs[3])
    assert read_finished(file, SCENARIO, points).keys() == {0, 1, 3}
    for other in (
        replace(SCENARIO, workload=draw(40, 20.0, seed=1)),
        replace(SCENARIO, workload=replace(SCENARIO.workload, output_tokens=SCENARIO.workload.output_tokens + 1)),
        replace(SCENARIO, cost=LinearCost((1.0, 0, 0, 0, 0, 0))),
        replace(SCENARIO, goodput={}),
        replace(
            SCENARIO, config=replace(SCENARIO.config, scheduler=replace(SCENARIO.config.scheduler, max_num_seqs=2))
        ),
    ):
        assert read_finished(file, other, points) == {}
    file.write_text(file.read_text() + "\n{}\n")
    with pytest.raises(ConfigError, match="line 4 is no result of a simulation"):
        read_finished(file, SCENARIO, points)


@pytest.mark.parametrize("text", [b"my notes", b'{"a":1}', b"\xff"])
def test_a_file_of_somebody_else_is_left_alone(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match="line 1 is no result of a simulation"):
        read_finished(file, SCENARIO, [{}])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["max_num_seqs"], "max_num_seqs is ''"),
        (["color=1"], "allowed: NAME=A,B,... of block_size"),
        (["max_num_seqs=1", "max-num-seqs=2"], "names max_num_seqs twice"),
        (["max_num_seqs=1,2,1"], "a value is given twice"),
        (["max_num_seqs=x"], "max_num_seqs is 'x'"),
        (["request_rate=0"], "request_rate is '0'"),
        (["gpu=h100,cpu"], "a CPU is measured"),
        (["gpu=h900"], "gpu is 'h900'"),
    ],
)
def test_sweeps_that_mean_nothing_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_sweeps(words)


def test_tables_and_pages_tell_each_point(runs: list[Simulated]) -> None:
    head, *lines = sweep_lines(runs)
    assert head.split()[:3] == ["max_num_batched_tokens", "prefix_caching", "req/s"]
    assert len(lines) == 4
    assert lines[1].split()[:3] == ["16", "False", f"{runs[1].result['request_throughput']:.2f}"]
    page = simulation_page({"model": "<tiny>"}, runs, ["a <note>"]).html()
    assert "&lt;tiny&gt;" in page
    assert "a &lt;note&gt;" in page
    assert "<note>" not in page
    for run in runs:
        assert point_name(run.point) in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<svg") >= 2 * 8
    alone = simulation_page({}, [Simulated({}, runs[0].result)], []).html()
    assert "Time per Output Token" in alone


@pytest.fixture
def simulate(octavo: Run, model_folder: Path) -> Callable[..., Any]:
    small = ("--max-model-len", "100", "--max-num-seqs", "4", "--quiet", "--model", str(model_folder))
    return lambda *words: octavo("simulate", "poisson:rate=90,n=30,input=9,output=12", *small, *words)


def test_the_verb_tells_figures_objectives_and_a_page(simulate: Any, tmp_path: Path) -> None:
    page, figures = tmp_path / "a.html", tmp_path / "a.json"
    words = ("--goodput", "ttft:1", "tpot:1", "--html", str(page), "--json", str(figures), "--overhead-us", "300")
    ran = simulate("--gpu", "h100", *words)
    assert ran.status == 0, ran.err
    assert re.search(r"Successful requests: +30\n", ran.out)
    assert re.search(r"Median TPOT \(ms\): +0\.3", ran.out)
    assert "not a measurement" in ran.out
    (point,) = json.loads(figures.read_text())["points"]
    assert 0 < point["result"]["request_goodput"] <= point["result"]["request_throughput"]
    assert "NVIDIA H100" in page.read_text()


def test_the_verb_sweeps_keeps_and_resumes(simulate: Any, tmp_path: Path) -> None:
    kept, cost = tmp_path / "kept.jsonl", tmp_path / "cost.json"
    write_cost(cost, LinearCost((2e-3, 1e-4, 0, 0, 0, 0), 100, 0.1))
    words = ("--cost", str(cost), "--sweep", "max_num_batched_tokens=8,32", "--output", str(kept), "--jobs", "1")
    first = simulate(*words)
    assert (first.status, first.err) == (0, ""), "it is to be quiet"
    assert len(kept.read_text().splitlines()) == 2
    changed = [json.loads(line) for line in kept.read_text().splitlines()]
    changed[1]["result"]["request_throughput"] = 12345.0
    kept.write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert "12,345.00" in simulate(*words).out
    assert len(kept.read_text().splitlines()) == 2
    assert json.loads(simulate(*words, "--json", "-").out)["points"][1]["point"] == {"max_num_batched_tokens": 32}


def test_texts_are_counted_by_the_tokenizer_of_the_model_or_the_one_that_is_named(
    octavo: Run, model_folder: Path, tmp_path: Path
) -> None:
    file, alone = tmp_path / "texts.jsonl", tmp_path / "config.json"
    file.write_text(json.dumps({"prompt": "twelve bytes", "output_tokens": 3}) + "\n")
    alone.write_text((model_folder / "config.json").read_text())
    for model, more, num in ((model_folder, (), 12), (alone, (), 3), (alone, ("--tokenizer", model_folder), 12)):
        ran = octavo("simulate", file, "--gpu", "h100", "--max-model-len", "100", "--model", model, *more)
        assert ran.status == 0, ran.err
        assert re.search(rf"Total input tokens: +{num}\n", ran.out)
        assert ("4 characters" in ran.err) == (num == 3)


def test_requests_that_the_engine_would_refuse_are_named(simulate: Any) -> None:
    ran = simulate("--gpu", "h100", "--max-model-len", "20")
    assert ran.status == 1
    assert "30 requests are refused" in ran.err
    assert "prompt and output are up to 21 tokens; allowed: 20 by the context" in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Name a card with --gpu, or a measured run with --cost"),
        (("--gpu", "h900"), "h900"),
        (("--gpu", "h100", "--efficiency", "1.5"), "--efficiency is 1.5; allowed: a number above 0 and at most 1"),
        (("--gpu", "h100", "--num-prompts", "0"), "--num-prompts is 0"),
        (("--gpu", "h100", "--goodput", "itl:3"), "--goodput is 'itl:3'"),
        (("--gpu", "h100", "--html", "nowhere/a.html"), "there is no folder nowhere"),
        (("--gpu", "h100", "--json", "/"), "is a folder; allowed: a file"),
        (("--gpu", "h100", "--save-cost", "a.json"), "--save-cost needs a --cost"),
        (("--gpu", "cpu", "--output", "a.jsonl"), "a CPU is measured anew each time"),
        (("--cost", "a.json", "--efficiency", "0.5"), "--cost has been measured"),
        (("--gpu", "h100", "--device", "cpu"), "a simulation runs nowhere"),
        (("--gpu", "h100", "--sweep", "max_num_seqs=2,0"), "max_num_seqs is 0"),
    ],
)
def test_what_cannot_be_simulated_is_refused_with_what_can(simulate: Any, words: tuple[str, ...], message: str) -> None:
    ran = simulate(*words)
    assert ran.status == 2
    assert message in ran.err
