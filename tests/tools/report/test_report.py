"""This module checks the parts of reports: nothing is left unescaped, nothing comes from elsewhere, and every value is
drawn where it lies. It does not know any tool.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.tools.report import (
    Ceiling,
    Cell,
    Html,
    Page,
    Point,
    Series,
    bars,
    details,
    duration,
    facts,
    line_chart,
    note,
    number,
    quantity,
    roofline,
    strip,
    table,
    text_lines,
)
from octavo.engine.tools.report.axes import Frame, make_axis
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = shutil.which("chromium")
HOSTILE = """</script><b onload='x'>&"<!--"""
VOID = {"meta"}
CEILING = Ceiling(f"card {HOSTILE}", 1e12, 1e14)


class Reader(HTMLParser):
    """Reads a page; every tag must be closed where it was opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def everything(text: str) -> Page:
    """Return a page of all parts, with a text wherever there can be one."""
    page = Page(text, text)
    points = [(1.0, 2.0), (2.0, 3.0)]
    page.add(
        text,
        text,
        note(text),
        facts({text: text}),
        details(text, text, note(text)),
        table([text, "n"], [[text, 1], [Cell(text, "bad", text, 0.5), None]], sortable=True),
        bars({text: [1.0, 2.0]}, parts=[text, text]),
        strip([1.0], [text]),
        line_chart([Series(text, points, points, [1])], title=text, x_label=text, y_label=text, x_names=[text] * 3),
        roofline([Point(text, text, 1.0, None), Point(text, text, 5.0, 1e12)], [CEILING], title=text),
    )
    return page


def test_every_text_is_escaped_wherever_it_stands() -> None:
    page = everything(HOSTILE).html()
    read = Reader(page)
    assert HOSTILE not in page
    assert "b" in read.tags  # of bars
    assert not any(name.startswith("on") for name, _ in read.attributes)
    assert sum(HOSTILE in text for text in read.texts) > 20


def test_a_page_asks_for_nothing_from_elsewhere() -> None:
    page = everything("plain").html()
    assert re.findall(r"https?:|\bsrc=|\bhref=|url\(|@import", page) == []


def test_only_a_page_with_a_sortable_table_has_a_script() -> None:
    page = Page("title")
    page.add("section", table(["a"], [[1]]))
    assert "<script>" not in page.html()
    page.add("section", table(["a"], [[1]], sortable=True))
    assert page.html().count("<script>") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12_345, "12,345"), (0.0, "0"), (1.234, "1.23"), (0.012345, "0.0123"), (99.96, "100"),
     (12345.6, "12,346"), (float("nan"), "nan"), (1.5e-7, "1.50e-07"), (-2.5, "-2.50")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.35e12, "3.35 TB/s"), (999.6, "1.00 kB/s"), (999.4, "999 B/s"), (0, "0 B/s"), (1e18, "1,000 PB/s")],
)
def test_quantities_have_a_prefix(value: float, text: str) -> None:
    assert quantity(value, "B/s") == text


def test_long_durations_are_in_minutes() -> None:
    assert (duration(119.0), duration(200.4), duration(1.25e-5)) == ("119 s", "3 min 20 s", "12.5 µs")


def test_columns_of_numbers_stand_right_and_sort_by_what_they_mean() -> None:
    found = table(
        ["name", "size", "share"], [["a", Cell("2 kB", sort=2000), Cell("5 %", share=0.05)], ["b", None, None]]
    )
    heads = re.findall(r'<th scope="col"( class=n)?>', found)
    assert heads == ["", " class=n", ""]
    assert 'data-key="2000"' in found


def test_a_row_needs_a_cell_for_each_column() -> None:
    with pytest.raises(AssertionError, match="a cell for each column"):
        table(["a", "b"], [["only one"]])


def test_a_table_for_a_terminal_is_aligned() -> None:
    rows = [[Cell("norm", small="why"), Cell("1 ms", small="50%")], [Cell("b"), Cell(None)]]
    assert text_lines(["call", "time"], rows) == ["call         time", "norm  1 ms    50%", "b"]


def test_bars_share_one_scale_or_fill_the_width() -> None:
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bars({"a": 1.0, "b": [2.0, 2.0]}))]
    assert widths == [25.0, 50.0, 50.0]
    filled = bars({"a": 1.0, "b": [2.0, 2.0]}, fill=True)
    assert [float(width) for width in re.findall(r"width:([\d.]+)%", filled)] == [100.0, 50.0, 50.0]


finite = st.floats(-1e9, 1e9).map(lambda x: round(x, 3))


@given(st.lists(finite, min_size=1, max_size=20))
def test_an_axis_holds_its_values_in_order(values: list[float]) -> None:
    axis = make_axis("x", values)
    places = [axis(value) for value in sorted(values)]
    assert places == sorted(places)
    assert places[0] >= -1e-9
    assert places[-1] <= 1 + 1e-9
    ticks = [value for value, _ in axis.ticks(6)]
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 8


@given(st.lists(st.floats(1e-9, 1e15), min_size=1, max_size=20))
def test_a_logarithmic_axis_ends_at_powers_of_ten(values: list[float]) -> None:
    axis = make_axis("x", values, is_log=True)
    assert axis.low <= min(values) * (1 + 1e-6)
    assert axis.high >= max(values) * (1 - 1e-6)
    assert all(math.isclose(math.log10(end), round(math.log10(end)), abs_tol=1e-9) for end in (axis.low, axis.high))
    assert math.isclose(axis(math.sqrt(axis.low * axis.high)), 0.5)


def polylines(chart: str) -> list[list[tuple[float, float]]]:
    """Return the lines of a chart in pixels, in the order of its drawings."""
    found = re.findall(r'<polyline class="[^"]*" points="([^"]*)"', chart)
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())] for line in found]


def test_a_line_goes_through_its_points() -> None:
    chart = line_chart({"it": [(0, 0), (5, 10), (10, 5)]}, x_label="x", y_label="y")
    wide, narrow = polylines(chart)
    for (a, b, c), width, height in ((wide, 880, 360), (narrow, 360, 300)):
        assert a[0] < b[0] < c[0] <= width
        assert math.isclose(b[0] - a[0], c[0] - b[0], abs_tol=0.11)
        assert 0 <= b[1] < c[1] < a[1] <= height  # up is less
        assert math.isclose(c[1] - b[1], a[1] - c[1], abs_tol=0.11)


def test_long_lines_keep_their_peaks() -> None:
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 7.0)
    chart = line_chart({"it": points}, x_label="x", y_label="y")
    assert len(chart) < 100_000
    frame = Frame(880, 360, make_axis("x", [0.0, 99_999.0]), make_axis("y", [1.0, 7.0]))
    assert frame.at(54_321.0, 7.0) in polylines(chart)[0]


def test_bad_points_are_marked_and_bands_drawn() -> None:
    plain = line_chart([Series("it", [(0, 1), (1, 2)])], x_label="x", y_label="y")
    marked = line_chart([Series("it", [(0, 1), (1, 2)], [(0, 2), (1, 3)], {1})], x_label="x", y_label="y")
    assert "mark" not in plain
    assert marked.count('class="mark"') == marked.count("<polygon") == 2  # one in each drawing


def test_a_roof_has_its_knee_where_bytes_and_arithmetic_meet() -> None:
    chart = roofline([Point("p", "g", 1.0, None)], [Ceiling("card", 1e12, 1e14)])
    first, knee, last = polylines(chart)[0]
    assert first[1] > knee[1] == last[1]
    # A call of 1 FLOP per byte may reach 1e12 FLOP/s: two decades below and left of the knee at 100.
    across, up = re.search(r'<circle class="c0 hollow" cx="([\d.]+)" cy="([\d.]+)"', chart).groups()  # type: ignore[union-attr]
    slope = (first[1] - knee[1]) / (knee[0] - first[0])
    assert math.isclose(float(up) - knee[1], slope * (knee[0] - float(across)), abs_tol=0.3)


def test_what_does_no_arithmetic_has_no_place_on_a_roof() -> None:
    assert "nothing to draw" in roofline([Point("copy", "g", 0.0, None)], [CEILING])
    assert "nothing to draw" in line_chart({"it": []}, x_label="x", y_label="y")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_any_width_and_its_tables_sort(browser: Browser, tmp_path: Path, width: int) -> None:
    page = everything("some words of text")
    columns = [f"column {i}" for i in range(9)]
    rows = [[name, *([Cell(f"{size} B", sort=size)] * 8)] for name, size in (("b", 2), ("a", 10), ("c", 1))]
    page.add("wide", table(columns, rows, sortable=True), Html('<p id="end"></p>'))
    file = tmp_path / "page.html"
    file.write_text(page.html(), encoding="utf-8")
    tab = browser.new_page(viewport={"width": width, "height": 800})
    said: list[str] = []
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(file.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    order = "[...document.querySelectorAll('table')].at(-1).innerText.match(/^[abc]\\b/gm).join('')"
    for index, expected in ((0, "abc"), (0, "cba"), (1, "cba"), (1, "abc")):
        tab.evaluate(
            f"document.querySelectorAll('table:last-of-type')[1].tHead.rows[0].cells[{index}].firstChild.click()"
        )
        assert tab.evaluate(order) == expected
    tab.close()
    assert said == []
