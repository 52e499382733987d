"""This module holds the page in a browser: against a server, and over a recording. It does not know how it is drawn."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from octavo.engine.observe import recording
from octavo.engine.observe.explain import explain, summaries
from octavo.engine.server import static
from octavo.engine.server.settings import ServerSettings
from playwright.sync_api import Browser, Page, expect, sync_playwright

from .recorded import RECORDING, record
from .serving import Running, serving

PAGE = Path(static.__file__).with_name("page")
MAX_BYTES = 100_000
CHROMIUM = shutil.which("chromium")
WAIT_MS = 60_000
"""For what takes a fraction of a second on a machine that does nothing else."""

# What is expected is otherwise waited for five seconds, whatever a context's own patience is.
expect.set_options(timeout=WAIT_MS)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open pages that may talk to nobody else, raise no error and log none but those that are expected."""
    context: Any = None
    said: list[str] = []
    asked: list[str] = []
    allowed: list[str] = []
    origin = ""

    def visit(url: str, expected: str = "", **options: Any) -> Page:
        nonlocal context, origin
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
        context.set_default_timeout(WAIT_MS)
        page: Page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        if expected:
            allowed.append(expected)
        origin = urlsplit(url).netloc
        page.goto(url)
        return page

    yield visit
    if context is not None:
        context.close()
    assert [text for text in said if not any(re.search(each, text) for each in allowed)] == []
    assert {urlsplit(url).netloc for url in asked if not url.startswith("blob:")} == {origin}


def on_server(visit: Open, server: Running, fragment: str = "", expected: str = "", **options: Any) -> Page:
    page = visit(f"{server.url}/{fragment}", expected, **options)
    expect(page.locator("#status")).to_have_attribute("data-state", "good")
    return page


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


def test_page_is_small_and_needs_nothing_else() -> None:
    files = sorted(PAGE.iterdir())
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert {path.suffix for path in files} == {".html", ".js", ".css", ".svg"}
    for path in files:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|\beval\(|innerHTML", text), path.name
    markup = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)", markup)


def test_recording_is_that_of_the_run() -> None:
    """Where the form of recordings changes: run recorded.py."""
    assert RECORDING.read_bytes() == record()


@needs_browser
def test_answer_by_keyboard_with_alternatives(tiny: Running, visit: Open) -> None:
    page = on_server(visit, tiny)
    page.fill("#p-temperature", "0")
    page.fill("#p-max_tokens", "12")
    page.focus(".skip")
    while page.evaluate("document.activeElement.id") != "prompt":
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") != "send", "the prompt was not on the way"
    page.keyboard.type("What is a block?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer .facts a")
    asked = [{"role": "user", "content": "What is a block?"}]
    answer = tiny.client.chat.completions.create(
        model="tiny", messages=asked, temperature=0, max_tokens=12, logprobs=True, top_logprobs=5
    ).choices[0]
    shown = page.locator(".answer .text").text_content()
    assert shown == answer.message.content
    assert "12 tokens out" in page.inner_text(".answer .facts")

    tokens, peek = page.locator(".answer .token"), page.locator("#peek")
    tokens.first.hover()
    expect(peek).to_be_visible()
    assert peek.locator("tr").count() in (5, 6)
    first = answer.logprobs.content[0]  # type: ignore[union-attr, index]
    assert f"logprob {first.logprob:.3f}" in peek.inner_text()
    tokens.first.focus()
    before = peek.inner_text()
    page.keyboard.press("ArrowRight")
    expect(peek).not_to_have_text(before)
    page.keyboard.press("Escape")
    expect(peek).to_be_hidden()

    page.click(".answer .facts a")
    page.wait_for_selector(".waterfall")
    assert "12 tokens" in page.inner_text(".story")
    assert page.locator("#tab-requests").get_attribute("aria-selected") == "true"
    page.focus("#tab-requests")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#live")).to_be_visible()


@needs_browser
def test_refusals_name_the_field_and_code_repeats_the_request(tiny: Running, visit: Open) -> None:
    page = on_server(visit, tiny, expected="status of 400")
    page.click("label:has([value=completion])")
    page.fill("#p-temperature", "hot")
    page.fill("#p-max_tokens", "9")
    page.fill("#p-stop", "\\n\n§")
    page.fill("#p-top_k", "7")
    page.fill("#prompt", "Once upon a time")
    page.click("#send")
    problem = page.locator("#problem")
    expect(problem).to_contain_text("temperature is 'hot'")
    assert page.locator("#p-temperature").get_attribute("aria-invalid") == "true"
    page.fill("#p-temperature", "0")
    page.click("#send")
    page.wait_for_selector(".answer .facts a")
    expect(problem).to_be_empty()

    page.click("#code")
    code = page.inner_text("#code-text")
    assert 'stop=["\\n", "§"]' in code
    assert '"top_k": 7' in code
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "snippet", "exec"), namespace := {})
    namespace["client"].close()
    assert printed.getvalue() == f"{page.locator('.answer .text').text_content()}\n"
    page.click("label:has([value=curl])")
    assert f"curl {tiny.url}/v1/completions" in page.inner_text("#code-text")
    page.keyboard.press("Escape")

    page.fill("#p-max_tokens", "200")
    page.check("#p-ignore_eos")
    page.fill("#p-stop", "")
    page.fill("#p-n", "4")
    page.click("#send")
    page.wait_for_selector(".choice >> nth=3")
    page.click("#send")
    page.wait_for_selector("text=stopped")
    tiny.eventually(lambda: tiny.server.app.context.admission.num_active == 0)


@needs_browser
def test_live_view_moves_while_requests_run(tiny: Running, visit: Open) -> None:
    page = on_server(visit, tiny, "#live")
    expect(page.locator("#status")).to_have_text("live")
    expect(page.locator("#queue")).to_contain_text("Nobody waits")
    pixels = "id => document.getElementById(id).toDataURL()"
    timeline, blocks = page.evaluate(pixels, "timeline"), page.evaluate(pixels, "blocks")
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            tiny.client.completions.create(
                model="tiny", prompt=["a", "b" * 40], max_tokens=150, n=3, extra_body={"ignore_eos": True}
            )

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        page.wait_for_selector("#running .part")
        page.wait_for_function("() => /[1-9]/.test(document.querySelectorAll('.tile b')[3].textContent)")
        assert page.evaluate(pixels, "timeline") != timeline
        assert page.evaluate(pixels, "blocks") != blocks
        assert page.evaluate(BARS) > 0
        page.focus("#timeline")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#step-readout")).to_contain_text("decode token")
        # Nobody watches: the stream is closed, and opened again for whoever comes back.
        hide = "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
        page.evaluate(f"{hide} document.dispatchEvent(new Event('visibilitychange')); }}", True)
        expect(page.locator("#status")).to_have_text("paused")
        page.evaluate(f"{hide} document.dispatchEvent(new Event('visibilitychange')); }}", False)
        expect(page.locator("#status")).to_have_text("live")
        page.click("#tab-requests")
        page.wait_for_selector("#recent [role=option]")
    finally:
        ended.set()
        thread.join()
    with page.expect_download() as download:
        page.click("#get-recording")
    saved = download.value.path()
    assert recording.loads(saved.read_bytes()).facts["model"] == "tiny"
    page.set_input_files("#open-recording input", saved)
    expect(page.locator("#status")).to_have_text("recording")
    page.click("#close-recording")
    expect(page.locator("#status")).to_have_attribute("data-state", "good")


@needs_browser
def test_server_that_goes_is_missed_and_found_again(visit: Open) -> None:
    with serving() as server:
        page = on_server(visit, server, "#live", expected="ERR_CONNECTION|ERR_INCOMPLETE|status of 503")
        expect(page.locator("#status")).to_have_text("live")
        port = server.address[1]
    expect(page.locator("#status")).to_contain_text("server gone")
    with serving(ServerSettings(port=port)):
        expect(page.locator("#status")).to_have_text("live")
        page.goto("about:blank")


@needs_browser
def test_key_is_asked_for_and_kept_in_the_tab(visit: Open) -> None:
    with serving(ServerSettings(port=0, api_keys=("a-secret-key",))) as server:
        page = visit(f"{server.url}/", "status of 401")
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.press("Escape")
        page.click("text=Give the key")
        page.fill("#key", "another-key")
        page.keyboard.press("Enter")
        expect(page.locator("#key-text")).to_have_text("The server refused that key.")
        page.fill("#key", "a-secret-key")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_attribute("data-state", "good")
        page.fill("#p-max_tokens", "5")
        page.fill("#prompt", "x")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".answer .facts a")
        page.click("#code")
        assert "a-secret-key" not in page.content()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
        page.goto("about:blank")


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


BARS = """() => {
    const canvas = document.getElementById("timeline");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, 130);
    let found = 0;
    for (let i = 0; i < data.length; i += 4) found += data[i] === 227 && data[i + 1] === 154 && data[i + 2] === 27;
    return found;
}"""
"""Pixels in the colour of prefill where the steps are."""

CONTRAST = """() => {
    const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const channels = text => {
        probe.clearRect(0, 0, 1, 1);
        probe.fillStyle = text;
        probe.fillRect(0, 0, 1, 1);
        return [...probe.getImageData(0, 0, 1, 1).data];
    };
    const linear = c => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const light = rgb => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(rgb[i] / 255), 0);
    const found = [];
    for (const node of document.body.querySelectorAll("*")) {
        const text = [...node.childNodes].map(each => (each.nodeType === 3 ? each.textContent.trim() : "")).join("");
        if (!text || !node.checkVisibility() || node.closest(":disabled, [hidden], .hidden, .skip, option")) continue;
        let behind = node, back = [0, 0, 0, 0];
        for (; behind && back[3] < 255; behind = behind.parentElement) {
            back = channels(getComputedStyle(behind).backgroundColor);
        }
        const [a, b] = [light(channels(getComputedStyle(node).color)), light(back)].sort((x, y) => y - x);
        found.push([(a + 0.05) / (b + 0.05), `${node.tagName}.${node.className}: ${text.slice(0, 30)}`]);
    }
    return found;
}"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_a_phone_in_both_schemes(tiny: Running, visit: Open, scheme: str) -> None:
    phone = {"width": 360, "height": 740}
    page = on_server(visit, tiny, color_scheme=scheme, viewport=phone, has_touch=True)
    page.fill("#prompt", "Hello")
    page.click("#params summary")
    page.fill("#p-max_tokens", "8")
    page.click("#send")
    page.wait_for_selector(".answer .facts a")
    page.locator(".answer .token").first.tap()
    expect(page.locator("#peek")).to_be_visible()
    page.click("#theme")
    page.click("#theme")
    page.click("#theme")
    for tab in ("playground", "live", "requests"):
        page.click(f"#tab-{tab}")
        if tab == "live":
            page.wait_for_selector(".tile b")
        if tab == "requests":
            page.locator("#recent [role=option]").first.click()
            page.wait_for_selector(".waterfall")
        assert page.evaluate("document.documentElement.scrollWidth") <= phone["width"]
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 10
        assert min(contrasts)[0] >= 4.5, min(contrasts)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(19, 21, 25)") == (scheme == "dark")
