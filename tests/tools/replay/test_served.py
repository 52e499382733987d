"""This module holds a server's run, recorded over HTTP and replayed, and `octavo replay` on it. It does not know how a
replay is made.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from octavo.engine import cli
from octavo.engine.events import EventKind
from octavo.engine.scheduler.admission import Admission
from octavo.engine.scheduler.queue import WaitingQueue
from octavo.engine.tools.replay import Script, read_bundle, replay

from ...server.raw import get
from ...server.serving import Running, serving

SIZES = {"max_num_seqs": 8, "block_size": 8, "kv_cache_tokens": 512, "max_model_len": 256, "max_num_batched_tokens": 48}
NUM_USERS = 6
NUM_TURNS = 5
SYSTEM = "You answer in one word, unless two are better. "


def leave(client: openai.OpenAI, text: str, **options: Any) -> None:
    """Go away after the first words of an answer; the server may have said everything by then."""
    stream = client.completions.create(model="fake", prompt=text, max_tokens=40, stream=True, **options)
    next(iter(stream))
    stream.close()


def talk(running: Running, user: int) -> None:
    """Hold a conversation whose turns begin with all before them; now and then leave in the middle of an answer."""
    client = running.client
    text = f"{SYSTEM[: 10 + 6 * user]}User {user % 2} asks: "
    for turn in range(NUM_TURNS):
        n, extra = 1 + (turn == 2), {"cache_salt": "own"} if user == 5 else {}
        if (user + turn) % 4 == 0:
            leave(client, text, seed=user, extra_body=extra)
            continue
        echo = {"echo": True, "logprobs": 1} if turn == 3 else {}
        stop = {"stop": list("abcdefgh")} if turn == 1 else {}
        answer = client.completions.create(
            model="fake", prompt=text, max_tokens=16 + 3 * turn, seed=user % 3, n=n, extra_body=extra, **echo, **stop
        )
        text = f"{text}{answer.choices[0].text[-20:]} and "


def served(path: Path, *, overlap: bool) -> Path:
    """Write the recording of a busy server, as it was when everything was over."""
    with serving(engine=SIZES | {"overlap": overlap}) as running:
        with ThreadPoolExecutor(NUM_USERS) as pool:
            list(pool.map(lambda user: talk(running, user), range(NUM_USERS)))
        while b'"abort"' not in get(running, "/recording").body:
            leave(running.client, SYSTEM)
        # More than fits, whoever comes when.
        running.client.completions.create(model="fake", prompt=SYSTEM, n=8, max_tokens=100, seed=1)
        with pytest.raises(openai.BadRequestError):
            running.client.completions.create(model="fake", prompt="x" * 400)
        running.check_canary()
        path.write_bytes(get(running, "/recording").body)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served(tmp_path_factory.mktemp("served") / "busy.json", overlap=False)


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["octavo", "replay", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_served_run_replays_to_the_same_schedule(bundle: Path, tmp_path: Path, overlap: bool) -> None:
    recording = read_bundle(served(tmp_path / "overlapped.json", overlap=True) if overlap else bundle)
    assert any(step.num_wasted_tokens for step in recording.ring.steps) == overlap
    kinds = {event.kind for event in recording.ring.events}
    assert kinds == set(EventKind), "the run was not busy enough"
    ends = {event.detail for event in recording.ring.events if event.kind == EventKind.FINISHED}
    assert ends == {"stop", "length", "abort"}
    assert sum(event.num_cached_tokens for event in recording.ring.events) > 100
    script = Script.of(recording)
    outcome = replay(script)
    assert outcome.difference is None, outcome.difference.lines(script)
    assert outcome.num_steps == recording.ring.num_steps > 50


def test_the_command_says_so(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, bundle) == 0
    out, err = capsys.readouterr()
    script = Script.of(read_bundle(bundle))
    assert out == f"same schedule: {len(script.steps):,} steps, {script.num_requests} requests\n"
    assert "busy.json: " in err
    assert run(monkeypatch, bundle, "--quiet", "--json", "-") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"same": True, "num_steps": len(script.steps), "first_step": 0}
    assert err == ""
    assert list(tmp_path.iterdir()) == []


def test_a_changed_scheduler_is_found_named_and_made_small(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script = Script.of(read_bundle(bundle))
    count = Admission._count_available
    with monkeypatch.context() as patch:
        patch.setattr(Admission, "_count_available", lambda self: max(0, count(self) - 6))
        assert run(patch, bundle, "--json", "found.json") == 1
        found = json.loads(Path("found.json").read_text())
        out = capsys.readouterr().out
        step = found["difference"]["step"]
        place = found["num_steps"]
        assert script.steps[place].event.step == step
        assert f"step {step:,} differs in who " in out.splitlines()[0]
        assert found["difference"]["recorded"] != found["difference"]["here"]
        assert 1 <= found["minimal"]["num_requests"] < script.num_requests
        small = Path(found["minimal"]["file"])
        assert small == Path("busy-minimal.json")
        assert run(patch, small, "--no-shrink", "--quiet", "--json", "-") == 1
        again = json.loads(capsys.readouterr().out)
        assert again["difference"]["field"] == found["difference"]["field"]
        assert again["num_steps"] == found["minimal"]["num_steps"] - 1


def test_the_first_step_is_that_in_which_the_change_acts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue served the wrong way round shows where two first wait together and one of them is admitted."""
    script = Script.of(read_bundle(bundle))
    head = WaitingQueue.head

    def last_of_the_first_two(self: WaitingQueue) -> object:
        first = head(self)
        return first if len(self) < 2 else self.first(2)[1]

    def pop(self: WaitingQueue) -> object:
        taken = self.head()
        self._heap.remove(next(item for item in self._heap if item[1] is taken))
        self._heap.sort()
        return taken

    monkeypatch.setattr(WaitingQueue, "head", last_of_the_first_two)
    monkeypatch.setattr(WaitingQueue, "pop", pop)
    waiting, expected = 0, None
    for place, step in enumerate(script.steps):
        waiting += sum(1 if event.kind == EventKind.ARRIVED else -(event.row < 0) for event in step.before)
        if waiting + len(step.facts["preempted"]) >= 2:
            expected = place
            break
        waiting = step.facts["num_waiting"]
    difference = replay(script).difference
    assert difference is not None
    assert difference.place == expected
    assert difference.field in ("admitted", "waits")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.json"], "gone.json: No such file"),
        (["bad.json"], "is no recording: it is not JSON"),
        (["list.json"], "allowed: an object with"),
        (["list.json", "--output", "no/small.json"], "there is no folder no"),
        (["list.json", "--output", "small.json", "--no-shrink"], "leave one of them out"),
        (["list.json", "--json", "/"], "is a folder"),
    ],
)
def test_what_is_no_bundle_is_refused(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("list.json").write_text("[]")
    assert run(monkeypatch, *words) == 2
    assert said in capsys.readouterr().err
