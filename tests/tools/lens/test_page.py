"""This module holds the page of a lens in a browser, and the verb. It does not know how the figures are found."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from octavo.engine import cli
from octavo.engine.cli.lens_table import table_lines
from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.tools.lens import lens_page, lens_record, look
from octavo.kernels import use_backend
from playwright.sync_api import Browser, Page, expect, sync_playwright
from rich.cells import cell_len

from ...checkpoints import make_tiny_llama

CHROMIUM = shutil.which("chromium")
WAIT_MS = 60_000
PROMPT = "</script><b>the\nin"
SMALL = ("--kv-cache-tokens", "512", "--device", "cpu", "--backend", "torch")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(autouse=True)
def _restore_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    template = "{% for message in messages %}<bos>{{ message.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    """Both paths over a prompt that would end the page's script, if it could."""
    with use_backend("torch"):
        llm = LLM(str(folder), device="cpu", backend="torch", kv_cache_tokens=512)
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        found: dict[str, Any] = json.loads(
            json.dumps(lens_record(look(llm, PROMPT, params, both=True)), allow_nan=False)
        )
    found["paths"][1]["readings"]["norm"][1][1] *= 2  # else nobody could tell the two paths apart
    return found


class Visit(NamedTuple):
    """An open page, and what it said and asked for."""

    page: Page
    said: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, record: dict[str, Any], tmp_path: Path) -> Iterator[Callable[[int, int], Page]]:
    """Open the page of the record at a size; it may ask for nothing else and complain of nothing."""
    file = tmp_path / "lens.html"
    file.write_text(lens_page(record), encoding="utf-8")
    said: list[str] = []

    def visit(width: int, height: int) -> Page:
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    yield visit
    for context in browser.contexts:
        context.close()
    assert said == []


@needs_browser
def test_a_walk_through_the_grid(visit: Callable[[int, int], Page], record: dict[str, Any]) -> None:
    page = visit(1280, 900)
    cell, label = page.locator("#cell"), lambda token_id: record["tokens"][str(token_id)]
    at = record["num_prompt_tokens"] - 1
    expect(page.locator("#grid tbody tr")).to_have_count(3)
    expect(page.locator("#grid tbody tr").first.locator("td")).to_have_count(len(record["positions"]))
    expect(cell.locator("h3")).to_have_text("layer 2, the last")
    expect(cell.locator("p")).to_have_text(f"position {at}, after {label(record['token_ids'][at])}")
    expect(cell.locator(".both li.says")).to_have_count(2)

    page.locator("#grid td[tabindex='0']").focus()
    for key in ("ArrowUp", "ArrowLeft", "Home"):
        page.keyboard.press(key)
    expect(cell.locator("h3")).to_have_text("layer 1")
    expect(cell.locator("p")).to_have_text("position 0, after <")
    assert page.evaluate("document.activeElement.dataset.at") == "1,0"
    for key in ("PageUp", "End", "ArrowRight"):
        page.keyboard.press(key)
    expect(cell.locator("h3")).to_have_text("the embedding")
    expect(cell.locator("p")).to_contain_text(f"position {record['positions'][-1]},")

    # A pointer shows what it is over, and what was chosen when it leaves.
    page.locator("#grid tbody tr").nth(1).locator("td").nth(2).hover()
    expect(cell.locator("h3")).to_have_text("layer 1")
    page.locator("h1").hover()
    expect(cell.locator("h3")).to_have_text("the embedding")


@needs_browser
def test_every_way_to_colour_and_both_paths(visit: Callable[[int, int], Page], record: dict[str, Any]) -> None:
    page = visit(1280, 900)
    first = page.locator("#grid tbody tr").nth(1).locator("td").nth(1)
    readings = [path["readings"] for path in record["paths"]]
    for way, value in {
        "kl": readings[0]["kl"][1][1],
        "norm": readings[0]["norm"][1][1],
        "cosine": readings[0]["cosine"][1][1],
        "rank": readings[0]["answer_rank"][1][1],
        "apart": record["differences"][1][1],
    }.items():
        page.locator("#way").select_option(way)
        assert float(first.inner_text().replace(",", "")) == pytest.approx(value, rel=0.06), way
    shades = set()
    for way in ("top", "answer"):
        page.locator("#way").select_option(way)
        expect(first).to_have_text(record["tokens"][str(readings[0]["top_ids"][1][1][0])])
        shades.add(first.evaluate("cell => getComputedStyle(cell).backgroundColor"))
    assert len(shades) == 2
    expect(page.locator("#cell h4").first).to_have_text("torch")
    page.locator("#way").select_option("norm")
    page.locator("#path").select_option(label="triton")
    assert float(first.inner_text().replace(",", "")) == pytest.approx(readings[1]["norm"][1][1], rel=0.06)


@needs_browser
def test_a_phone_has_room_for_it(visit: Callable[[int, int], Page]) -> None:
    page = visit(390, 844)
    page.locator("#grid tbody td").nth(1).click()
    expect(page.locator("#cell h3")).to_have_text("the embedding")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = page.evaluate("Math.max(...[...document.querySelectorAll('#cell, .lens-scroll')].map(e => e.offsetWidth))")
    assert wide <= 390


def test_the_page_needs_nothing_from_elsewhere(record: dict[str, Any]) -> None:
    # A token that would end the script, if it could.
    record = record | {"tokens": record["tokens"] | {str(record["token_ids"][0]): "</script><b>"}}
    page = lens_page(record)
    assert not re.findall(r"(?:src|href)=|@import|url\(|https?://(?!www\.w3\.org)", page)
    assert page.count("</script>") == 2
    data = re.search(r'id="record">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1]) == record


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def octavo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*words: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["octavo", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ran(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_the_verb(octavo: Callable[..., Ran], folder: Path, tmp_path: Path) -> None:
    files = ("--html", tmp_path / "a.html", "--json", tmp_path / "a.json")
    ran = octavo("lens", folder, "in the", "--max-tokens", "2", "--ignore-eos", *files, *SMALL)
    assert ran.status == 0, ran.err
    lines = ran.out.splitlines()
    assert [line.split()[0] for line in lines] == ["reads", "0", "1", "2", "answer"]
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (record["num_prompt_tokens"], len(record["token_ids"])) == (4, 6)
    assert "only torch ran: Triton's interpreter is slow; --both" in ran.err
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == lens_page(record)


def test_json_on_stdout_layers_and_chat(octavo: Callable[..., Ran], folder: Path) -> None:
    words = ("--chat", "--layers", "0,1-1", "--top", "2", "--last", "2", "--max-tokens", "1", "--json", "-", "--quiet")
    ran = octavo("lens", "--model", folder, "in", *words, *SMALL)
    assert (ran.status, ran.err) == (0, "")
    record = json.loads(ran.out)
    assert [record["tokens"][str(token_id)] for token_id in record["token_ids"][:2]] == ["<bos>", "in"]
    assert record["layers"] == [0, 1, 2]
    assert len(record["paths"][0]["readings"]["top_ids"][0][0]) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("only a model",), "1 words given; allowed: a model and a prompt"),
        (("a", "b", "--model", "c"), "2 words given besides the model that is named already"),
        (("a", "b", "--layers", "1,x"), "--layers is '1,x'; allowed: all, or numbers and ranges such as 0,5,10-15"),
        (("a", "b", "--layers", "3-1"), "--layers holds '3-1'; allowed: ranges that ascend"),
        (("a", "b", "--logprobs", "2"), "a lens cannot show logprobs"),
        (("a", "b", "--n", "2"), "a lens cannot show n"),
        (("{folder}", "b", "--layers", "3", *SMALL), "layer 3 is not there; allowed: 0 (the embedding) to 2"),
    ],
)
def test_words_that_are_wrong(words: tuple[str, ...], expected: str, octavo: Callable[..., Ran], folder: Path) -> None:
    ran = octavo("lens", *(word.replace("{folder}", str(folder)) for word in words))
    assert ran.status == 2
    assert expected in ran.err


def test_the_table_fits_its_terminal(record: dict[str, Any]) -> None:
    """Columns are counted as a terminal counts them, and the last positions are those that stay."""
    wide = record | {"tokens": dict.fromkeys(record["tokens"], "東京の都市")}
    for found, width in ((record, 200), (record, 60), (record, 8), (wide, 80)):
        lines, num_shown = table_lines(found, width)
        assert 1 <= num_shown <= len(record["positions"])
        assert width < 30 or max(map(cell_len, lines)) <= width
    lines, num_shown = table_lines(record, 60)
    assert num_shown < len(record["positions"])
    assert lines[-1].split()[-1] == record["tokens"][str(record["answer_ids"][-1])]
