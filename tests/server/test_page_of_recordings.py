"""This module holds the page over recordings, which need no engine. It does not know how it is drawn."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.observe import recording
from octavo.engine.observe.explain import explain, summaries
from octavo.engine.server import static
from playwright.sync_api import expect

from .browsing import Open, needs_browser
from .recorded import RECORDING, record

PAGE = Path(static.__file__).with_name("page")


class _Files(SimpleHTTPRequestHandler):
    """The page and recordings as plain files, with the headers that the server sends."""

    def __init__(self, *arguments: Any, recordings: dict[str, Path], **options: Any) -> None:
        self._recordings = recordings
        super().__init__(*arguments, **options)

    def translate_path(self, path: str) -> str:
        return str(self._recordings.get(path) or super().translate_path(path))

    def end_headers(self) -> None:
        for name, value in static._HEADERS:
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def overlapped() -> tuple[bytes, list[dict[str, Any]]]:
    """The recording of a run in which steps overlap, and what a watcher was told of it."""
    told: list[dict[str, Any]] = []
    return record(overlap=True, told=told), told


@pytest.fixture(scope="module")
def plain_files(tmp_path_factory: pytest.TempPathFactory, overlapped: tuple[bytes, Any]) -> Iterator[str]:
    file = tmp_path_factory.mktemp("recordings") / "overlapped.json"
    file.write_bytes(overlapped[0])
    files = partial(_Files, directory=str(PAGE), recordings={"/run.json": RECORDING, "/overlapped.json": file})
    server = ThreadingHTTPServer(("127.0.0.1", 0), files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_recording_is_that_of_the_run() -> None:
    """Where the form of recordings changes: run recorded.py."""
    assert RECORDING.read_bytes() == record()


@needs_browser
def test_recording_opens_without_an_engine(plain_files: str, visit: Open) -> None:
    page = visit(f"{plain_files}?recording=run.json")
    expect(page.locator("#status")).to_have_text("recording")
    expect(page.locator("#live")).to_be_visible()
    seek = "part => { const s = document.getElementById('seek'); s.value = part; s.dispatchEvent(new Event('input')); }"
    page.evaluate(seek, 440)
    assert page.locator("#queue tbody tr").count() > 3
    assert "no blocks free" in page.inner_text("#queue") or "token budget spent" in page.inner_text("#queue")
    assert re.search(r"shared [1-9]", page.inner_text("#blocks-legend"))
    assert page.locator("#running tbody tr").count() > 5
    page.evaluate(seek, 0)
    assert "Nothing runs" in page.inner_text("#running")
    page.select_option("#speed", "16")
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Play")
    length, end = page.inner_text("#position").split(" of ")
    assert f"{length} s" == end
    page.click("#tab-requests")
    page.locator("#recent [role=option]", has_text="preempted").first.click()
    page.wait_for_selector(".waterfall")
    assert "Preempted in step" in page.inner_text(".story")
    assert page.locator(".fall").count() > 5


@needs_browser
@pytest.mark.parametrize("name", ["run.json", "overlapped.json"])
def test_recording_is_explained_as_the_engine_does(
    plain_files: str, overlapped: tuple[bytes, Any], visit: Open, name: str
) -> None:
    page = visit(f"{plain_files}?recording={name}")
    mine = page.evaluate(
        """async name => {
        const [{ Run }, { readRecording }] = await Promise.all([import("./run.js"), import("./data.js")]);
        const run = new Run(readRecording(await (await fetch(name)).json())), lines = run.summaries(run.end);
        return { lines, explained: lines.map(line => run.explain(line.request_id).choices), steps: run.steps };
    }""",
        name,
    )
    ring = recording.loads(RECORDING.read_bytes() if name == "run.json" else overlapped[0]).ring
    for before, step in pairwise(mine["steps"]):
        assert before["end"] <= step["start"] <= step["execute"] < step["end"]
    assert [step["prefill"] + step["decode"] for step in mine["steps"]] == [
        int(step.num_scheduled_tokens.sum()) for step in ring.steps
    ]
    lines = {line["request_id"]: line for line in summaries(ring, 1000)}
    assert lines.keys() == {line["request_id"] for line in mine["lines"]}
    assert sum(line["num_preemptions"] for line in lines.values()) > 3
    for line, choices in zip(mine["lines"], mine["explained"], strict=True):
        theirs = lines[line["request_id"]]
        assert line.pop("seconds") == pytest.approx(theirs["seconds"], abs=1e-5)
        assert line == {name: theirs[name] for name in line}
        whole = explain(ring, line["request_id"])
        assert whole is not None
        for ours, other in zip(choices, whole["choices"], strict=True):
            for name in ("state", "prompt_tokens", "output_tokens", "cached_tokens", "finish_reason"):
                assert ours[name] == other[name]
            for name in ("seconds", "queued_s", "time_to_first_token_s"):
                assert ours[name] == pytest.approx(other[name], abs=1e-5)
            assert ours["tokens"]["at_s"] == pytest.approx(other["tokens"]["at_s"], abs=1e-5)
            assert ours["chunks"]["step"] == other["chunks"]["step"]
            assert ours["chunks"]["num_tokens"] == other["chunks"]["num_tokens"]
            for part in ("at_s", "seconds"):
                assert ours["chunks"][part] == pytest.approx(other["chunks"][part], abs=1e-5)
            for wait, known in zip(ours["waits"], other["waits"], strict=True):
                assert wait["at_s"] == pytest.approx(known["at_s"], abs=1e-5)
                long = {reason: seconds for reason, seconds in known["reasons"].items() if seconds > 1e-5}
                assert {why: s for why, s in wait["reasons"].items() if s > 1e-5} == pytest.approx(long, abs=1e-5)


@needs_browser
def test_live_view_tells_prompts_from_outputs_where_steps_overlap(
    plain_files: str, overlapped: tuple[bytes, list[dict[str, Any]]], visit: Open
) -> None:
    """A message may tell who was admitted to a step that only the next one tells of."""
    page = visit(f"{plain_files}?recording=overlapped.json")
    seen = page.evaluate(
        """async messages => {
        messages = JSON.parse(messages);
        const [{ Run }, { readLive, readRecording }] = await Promise.all([import("./run.js"), import("./data.js")]);
        const run = new Run(readRecording(await (await fetch("overlapped.json")).json())), found = new Map();
        let seen = null;
        for (const message of messages) {
            seen = readLive(message, seen, { id: "fake" });
            for (const step of seen.steps) found.set(step.step, [step.prefill, step.start]);
        }
        return [run.steps.map(step => [step.prefill, step.start]), [...found.values()]];
    }""",
        json.dumps(overlapped[1]),
    )
    assert len(seen[0]) > 300
    assert seen[0] == seen[1]
