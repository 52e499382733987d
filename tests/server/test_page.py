"""This module holds the page in a browser, against a server. It does not know how it is drawn."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.observe import recording
from octavo.engine.server import static
from octavo.engine.server.settings import ServerSettings
from playwright.sync_api import Page, expect

from .browsing import Open, needs_browser
from .serving import Running, serving

PAGE = Path(static.__file__).with_name("page")
MAX_BYTES = 100_000


def on_server(visit: Open, server: Running, fragment: str = "", expected: str = "", **options: Any) -> Page:
    page = visit(f"{server.url}/{fragment}", expected, **options)
    expect(page.locator("#status")).to_have_attribute("data-state", "good")
    return page


def test_page_is_small_and_needs_nothing_else() -> None:
    files = sorted(PAGE.iterdir())
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert {path.suffix for path in files} == {".html", ".js", ".css", ".svg"}
    for path in files:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|\beval\(|innerHTML", text), path.name
    markup = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)", markup)


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
