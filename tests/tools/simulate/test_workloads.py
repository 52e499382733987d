"""Where workloads come from: words, files of lines, conversations, recordings; and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from octavo.engine.errors import ConfigError
from octavo.engine.observe import recording
from octavo.engine.observe.ring import EventRing
from octavo.engine.tools.simulate.reading import read_workload
from octavo.engine.tools.simulate.simulation import Simulation
from octavo.engine.tools.simulate.workload import Workload

from .loads import Constant, draw, limits


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(*lines: Any, name: str = "a.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return str(file)

    return write


def sizes(workload: Workload) -> list[tuple[float, int, int]]:
    columns = (workload.arrival_s, workload.prompt_tokens, workload.output_tokens)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def prompts(workload: Workload, vocab_size: int = 50_000) -> list[list[int]]:
    made = [workload.prompt(i, vocab_size) for i in range(len(workload))]
    for ids, length in zip(made, workload.prompt_tokens.tolist(), strict=True):
        assert (ids.dtype, len(ids)) == (np.dtype(np.int32), length)
        assert 0 <= ids.min() <= ids.max() < vocab_size
    return [ids.tolist() for ids in made]


def test_a_poisson_process_has_its_rate_its_lengths_and_its_seed() -> None:
    text = "poisson:rate=8,n=4000,input=100-300,output=lognormal:200:0.5:400"
    workload = read_workload(text)
    assert (len(workload), workload.rate) == (4000, pytest.approx(8))
    gaps = np.diff(workload.arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.08)
    assert set(workload.prompt_tokens.tolist()) == set(range(100, 301))
    assert np.median(workload.output_tokens) == pytest.approx(200, rel=0.05)
    assert workload.output_tokens.max() == 400
    assert sizes(read_workload(text)) == sizes(workload) != sizes(read_workload(text + ",seed=1"))
    assert len(read_workload(text, most=7)) == 7
    assert read_workload("poisson:rate=inf,n=3").arrival_s.tolist() == [0, 0, 0]
    even = np.diff(read_workload("poisson:rate=4,n=9,burstiness=inf").arrival_s)
    assert even.tolist() == pytest.approx([0.25] * 8)


def test_bursts_come_together_and_lengths_are_like_conversations_where_asked() -> None:
    burst = read_workload("burst:size=3,every=2.5,n=7,input=10,output=2")
    assert sizes(burst) == [(at, 10, 2) for at in (0, 0, 0, 2.5, 2.5, 2.5, 5)]
    chats = read_workload("poisson:rate=1,n=20000,like=sharegpt")
    assert chats.prompt_tokens.mean() == pytest.approx(161, rel=0.03)
    assert chats.output_tokens.mean() == pytest.approx(338, rel=0.03)
    assert max(chats.prompt_tokens.max(), chats.output_tokens.max()) == 1024


def test_drawn_prompts_share_their_prefix_and_nothing_else() -> None:
    workload = read_workload("burst:size=300,every=1,n=300,input=1-40,prefix=32,prefixes=3")
    found = prompts(workload)
    assert len({tuple(ids[:32]) for ids in found}) == 3
    assert len({tuple(ids[32:]) for ids in found}) == 300
    assert len({tuple(ids[:32]) for ids in prompts(workload, 7)}) == 3
    many = read_workload("poisson:rate=1,n=70000,input=40")
    assert many.prompt(0, 50_000)[2:].tolist() == many.prompt(65_536, 50_000)[2:].tolist()
    assert many.prompt(0, 50_000)[:2].tolist() != many.prompt(65_536, 50_000)[:2].tolist()


def test_lines_may_have_sizes_texts_or_ids(write: Any) -> None:
    file = write(
        {"arrival_s": 105.5, "prompt_tokens": 20, "output_tokens": 3},
        "",
        {"arrival_s": 100, "prompt_tokens": 10, "max_tokens": 4},
    )
    assert sizes(read_workload(file)) == [(0, 10, 4), (5.5, 20, 3)]
    texts = write({"prompt": "abcdefgh", "output_tokens": 1}, {"prompt": "abcdxyz", "output_tokens": 2})
    workload = read_workload(texts)
    assert "4 characters" in workload.notes[0]
    (first, same), (again, other) = prompts(workload)
    assert first == again
    assert same != other
    known = read_workload(texts, lambda text: [ord(each) for each in text])
    assert (prompts(known)[1], known.notes) == ([*map(ord, "abcdxyz")], ())
    chat = write({"messages": [{"role": "user", "content": "hi"}], "output_tokens": 1})
    assert len(prompts(read_workload(chat, lambda text: [len(text)] * 5))[0]) == 5
    assert prompts(read_workload(write({"prompt": [7, 8, 9], "output_tokens": 1}))) == [[7, 8, 9]]


def test_names_of_blocks_say_what_is_shared_as_in_mooncakes_traces(write: Any) -> None:
    line = {"timestamp": 2500, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]}
    file = write({**line, "timestamp": 0}, {**line, "hash_ids": [1, 2, 4]}, {**line, "input_length": 600})
    workload = read_workload(file)
    assert workload.arrival_s.tolist() == [0, 2.5, 2.5]
    first, second, third = prompts(workload)
    assert first[:1024] == second[:1024]
    assert first[1024:] != second[1024:]
    assert third == first[:600]


def test_conversations_are_taken_where_they_fit_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    def chat(question: str, *answers: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": each} for each in (question, *answers)]}

    file = tmp_path / "chats.json"
    long = "word " * 5000
    file.write_text(json.dumps([chat("x" * 40, "y" * 80), chat("alone"), chat(long, "z" * 80), chat("q" * 40, "n")]))
    workload = read_workload(str(file))
    assert sizes(workload) == [(0, 10, 20)]
    assert "2 conversations left out" in workload.notes[1]
    assert workload.at_rate(math.inf).rate == math.inf
    file.write_text(json.dumps([chat("tiny", "tiny")]))
    with pytest.raises(ConfigError, match="no conversation that fits"):
        read_workload(str(file))


def test_a_recording_gives_back_the_times_and_sizes_that_made_it(tmp_path: Path) -> None:
    ring, workload = EventRing(100_000, 1000), draw(30, 3.0)
    Simulation(workload, limits(), Constant(0.01), recorder=ring).run()
    file = tmp_path / "run.json"
    file.write_bytes(recording.dumps(ring, {"num_blocks": 64, "block_size": 16}))
    found = read_workload(str(file))
    assert found.prompt_tokens.tolist() == workload.prompt_tokens.tolist()
    assert found.output_tokens.tolist() == workload.output_tokens.tolist()
    assert found.arrival_s == pytest.approx(workload.arrival_s - workload.arrival_s[0], abs=2e-6)
    assert "no prompts" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poisson:n=3", "rate= is missing"),
        ("poisson:rate=x", "rate is 'x'"),
        ("poisson:rate=1,n=1.5", "n is '1.5'"),
        ("poisson:rate=1,m=3", "'m'; allowed: rate=, burstiness=, n="),
        ("poisson:rate=1,n", "'n'; allowed"),
        ("poisson:rate=1,like=books", "allowed: sharegpt"),
        ("burst:size=0,every=1", "size is '0'; allowed: an integer from 1 to 16,777,216"),
        ("burst:size=1,every=inf", "every is 'inf'; allowed: a number from 0 to 1,000,000,000"),
        ("poisson:rate=nan", "rate is 'nan'; allowed: a number from 1e-09 on, or inf"),
        ("poisson:rate=1,n=1e12", "n is '1e12'; allowed: an integer from 1 to"),
        ("poisson:rate=1,prefix=1e13", "prefix is '1e13'"),
        ("poisson:rate=1,seed=-1", "seed is '-1'"),
        ("poisson:rate=1,input=0", "a length is '0'"),
        ("poisson:rate=1,input=9-3", "a length is '9-3'"),
        ("poisson:rate=1,input=lognormal:9", "a length is 'lognormal:9'"),
        ("poisson:rate=1,output=lognormal:-9:1", "a length is"),
        ("poisson:rate=1,output=lognormal:nan:1", "a length is"),
        ("poisson:rate=1,output=lognormal:9:1:-5", "a length is"),
        ("poisson:rate=1,output=lognormal:9:1:nan", "a length is"),
        ("poisson:rate=1,output=exponential:9:8:7", "a length is"),
        ("poisson:rate=1,output=99999999", "a length is"),
        ("poisson:rate=1,output=1-9:9", "a length is"),
        ("nowhere.jsonl", "No such file or directory; allowed: a file, poisson:..., burst:..."),
    ],
)
def test_words_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="the workload") as caught:
        read_workload(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(("rate", "burstiness"), [(1e-310, 1.0), (1.0, 1e-300)])
def test_times_that_no_numbers_hold_are_refused(rate: float, burstiness: float) -> None:
    workload = read_workload("poisson:rate=1,n=9")
    with pytest.raises(ConfigError, match=f"a rate of {rate:g} with a burstiness of {burstiness:g}"):
        workload.at_rate(rate, burstiness)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ([1], "no ShareGPT file"),
        (7, "line 2: is 7; allowed: an object"),
        ({"prompt_tokens": 5}, "output_tokens is None"),
        ({"output_tokens": 5}, "either prompt or prompt_tokens"),
        ({"prompt_tokens": 0, "output_tokens": 5}, "prompt_tokens is 0; allowed: an integer from 1"),
        ({"prompt_tokens": 5, "output_tokens": True}, "output_tokens is True"),
        ({"prompt_tokens": 5, "output_tokens": 5, "color": 1}, "unknown key 'color'"),
        ({"prompt_tokens": 5, "output_tokens": 5, "max_tokens": 5}, "a second key 'max_tokens'"),
        ({"prompt_tokens": 5, "output_tokens": 5, "arrival_s": -1}, "arrival_s is -1"),
        ({"prompt_tokens": 5, "output_tokens": 5, "arrival_s": 10**400}, "arrival_s is an integer of"),
        ('{"prompt_tokens": 5, "output_tokens": 5, "arrival_s": 1e999}', "arrival_s is inf; allowed: a number from 0"),
        ({"prompt_tokens": 5, "output_tokens": 5, "arrival_s": 1}, "some requests have arrival_s and some have not"),
        ({"prompt": "", "output_tokens": 5}, "the prompt is empty"),
        ({"prompt": [1.5], "output_tokens": 5}, "the prompt is a list of 1"),
        ({"prompt": "ab", "output_tokens": 5}, "some requests have a prompt, some only its size"),
        ({"input_length": 513, "output_length": 5, "hash_ids": [1]}, "hash_ids is a list of 1"),
        ({"input_length": 512, "output_length": 5, "hash_ids": [-1]}, "hash_ids is a list of 1"),
    ],
)
def test_lines_that_mean_nothing_are_refused(write: Any, line: Any, message: str) -> None:
    good = {"prompt_tokens": 5, "output_tokens": 5}
    file = write(*([line] if isinstance(line, list) else [good, line]))
    with pytest.raises(ConfigError, match="the workload") as caught:
        read_workload(file)
    assert message in str(caught.value)
