"""This module checks where the time of steps is said to go, on an engine with a tiny model. It does not know how fast
any machine is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.errors import ConfigError
from octavo.engine.layers.linear import Linear
from octavo.engine.llm import LLM
from octavo.engine.runner import model_runner
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.tools.profile.probes import PARTS, attached
from octavo.engine.tools.profile.spans import Spans
from octavo.engine.tools.profile.step_page import part_table, step_page
from octavo.engine.tools.profile.steps import Load, StepProfile, busy_part
from octavo.engine.tools.report import text_lines
from octavo.engine.tools.roofline import StepWork
from octavo.engine.tools.simulate.cost import read_cost
from octavo.kernels import dispatch, use_backend

from ...checkpoints import make_tiny_llama

NUM_LAYERS, INPUT, OUTPUT = 2, 20, 4
SETTINGS: dict[str, Any] = {"kv_cache_tokens": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module", autouse=True)
def _torch_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    return LLM(str(folder), device="cpu", backend="torch", **SETTINGS)


@pytest.fixture(scope="module")
def document(llm: LLM) -> dict[str, Any]:
    """What three rounds say."""
    profile = StepProfile(llm, Load((1, 4), INPUT, OUTPUT))
    num_steps = [sum(1 for _ in profile.run_round()) for _ in range(3)]
    assert num_steps == [profile.num_steps] * 3  # a prompt of the larger batch is cut in two by the budget
    return profile.document()


def tokens_of(llm: LLM) -> list[list[int]]:
    prompts = [[1, 2, 3, 4, 5], [9] * 30]
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, params)]


def test_the_engine_is_as_it_was_and_says_the_same(llm: LLM) -> None:
    runner = llm.engine.core.runner
    assert isinstance(runner, model_runner.ModelRunner)
    owners: list[Any] = [
        llm,
        runner,
        runner._batch,
        runner._sampler,
        runner.model,
        llm._texts,
        llm.engine.core.scheduler,
    ]
    before = [dict(vars(owner)) for owner in owners]
    call, build, ops = Linear.__call__, model_runner.build_attention_metadata, dict(dispatch.active)
    expected = tokens_of(llm)
    with attached(llm, Spans()):
        assert Linear.__call__ is not call
        assert tokens_of(llm) == expected
    assert [vars(owner).keys() for owner in owners] == [each.keys() for each in before]
    assert "step" not in vars(llm)
    assert (Linear.__call__, model_runner.build_attention_metadata) == (call, build)
    assert {name: dispatch.active[name] for name in ops} == ops


def test_an_error_in_a_step_leaves_nothing_attached(llm: LLM) -> None:
    call = Linear.__call__
    with pytest.raises(RuntimeError, match="in between"), attached(llm, Spans()):
        raise RuntimeError("in between")
    assert Linear.__call__ is call


def test_parts_add_up_to_their_steps(document: dict[str, Any]) -> None:
    assert document["groups"]
    for group in document["groups"]:
        assert sum(part["seconds"] for part in group["parts"].values()) == pytest.approx(group["seconds"])
        assert set(group["parts"]) <= set(PARTS)


def test_every_part_runs_as_often_as_the_model_has_it(document: dict[str, Any]) -> None:
    parts = {group["name"]: group["parts"] for group in document["groups"]}["decode, batch of 4"]
    calls = {name: part["num_calls"] for name, part in parts.items()}
    per_layer = ("qkv", "o", "up", "down", "activation", "write_kv", "attention of decodes")
    assert {name: calls[name] for name in per_layer} == dict.fromkeys(per_layer, NUM_LAYERS)
    assert calls["norm"] == 2 * NUM_LAYERS + 1
    assert calls["head"] == 1
    assert "attention of prompts" not in calls
    assert {name: calls[name] for name in ("schedule", "update", "rest", "text", "between")} == dict.fromkeys(
        ("schedule", "update", "rest", "text", "between"), 1
    )


def test_steps_say_what_they_had_to_do(document: dict[str, Any]) -> None:
    first = [step for step in document["steps"] if (step["round"], step["batch_size"]) == (0, 1)]
    works = [StepWork(**{name: step[name] for name in StepWork._fields}) for step in first]
    expected = [StepWork.of([(INPUT, INPUT)])] + [StepWork.of([(1, INPUT + i)]) for i in range(1, OUTPUT)]
    assert works == expected
    assert [step["kind"] for step in first] == ["prefill"] + ["decode"] * (OUTPUT - 1)
    assert {step["kind"] for step in document["steps"]} == {"prefill", "decode", "mixed"}
    assert all(step["seconds"] > 0 for step in document["steps"])


def test_steps_that_would_overlap_are_run_one_by_one(tmp_path: Path) -> None:
    llm = LLM(str(make_tiny_llama(tmp_path)), device="cpu", backend="torch", overlap=True, graphs=True, **SETTINGS)
    expected = tokens_of(llm)
    profile = StepProfile(llm, Load((1,), INPUT, OUTPUT))
    assert sum(1 for _ in profile.run_round()) == OUTPUT
    assert [step["num_tokens"] for step in profile.document()["steps"]] == [INPUT] + [1] * (OUTPUT - 1)
    assert llm.engine.core.scheduler.limits.max_steps_in_flight == 2
    assert tokens_of(llm) == expected


def test_a_simulation_can_be_fitted_to_the_steps(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(json.dumps(document))
    cost = read_cost(tmp_path / "profile.json")
    assert cost.num_steps == len(document["steps"])
    assert cost.step_s(StepWork.of([(INPUT, INPUT)])) > 0


def test_every_round_is_a_value_of_every_figure(document: dict[str, Any]) -> None:
    assert {len(metric["values"]) for metric in document["metrics"].values()} == {3}
    steps = [step for step in document["steps"] if step["kind"] == "decode" and step["batch_size"] == 4]
    means = [
        sum(times) / len(times)
        for number in range(3)
        if (times := [step["seconds"] for step in steps if step["round"] == number])
    ]
    assert document["metrics"]["decode, batch of 4: a step"]["values"] == pytest.approx(means)


def test_rounds_have_prompts_of_their_own(llm: LLM) -> None:
    before = llm.stats
    profile = StepProfile(llm, Load((2,), 64, 2))
    for _ in range(2):
        list(profile.run_round())
    assert llm.stats.prefix_cache_queries - before.prefix_cache_queries >= 2 * 2 * 64
    assert llm.stats.prefix_cache_hits == before.prefix_cache_hits


def test_a_round_that_is_left_early_leaves_no_request(llm: LLM) -> None:
    profile = StepProfile(llm, Load((3,), INPUT, OUTPUT))
    running = profile.run_round()
    next(running)
    running.close()
    assert (llm.stats.num_running, llm.stats.num_waiting, profile.num_rounds) == (0, 0, 0)


def test_a_trace_has_every_part_by_name(llm: LLM, tmp_path: Path) -> None:
    profile = StepProfile(llm, Load((2,), INPUT, 3))
    list(profile.run_round())
    list(profile.trace(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {"schedule", "qkv", "head", "sample", "attention of decodes"} <= names
    assert {"aten::embedding", "aten::mm"} & {event["name"] for event in events}
    assert {step["round"] for step in profile.document()["steps"]} == {0}


def test_proton_is_refused_without_a_gpu(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        StepProfile(llm, Load((1,), 4, 2)).proton(tmp_path / "p")  # before any round is run


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], 0.0),
        ([(0, 1)], 1.0),
        ([(0, 1), (3, 4)], 0.5),
        ([(0, 4), (1, 2), (3, 5)], 1.0),
        ([(5, 6), (0, 1), (0, 2)], 0.5),
    ],
)
def test_overlapping_kernels_count_once(ranges: list[tuple[float, float]], expected: float) -> None:
    assert busy_part(ranges) == expected


def test_the_page_and_the_table_show_every_part(document: dict[str, Any]) -> None:
    page, lines = step_page(document, [], []), "\n".join(text_lines(*part_table(document)))
    for group in document["groups"]:
        assert group["name"] in page
        assert group["name"] in lines
        assert all(name in lines and name in page for name in group["parts"])
