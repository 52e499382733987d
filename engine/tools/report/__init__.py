"""This package holds the parts that reports are built of: one page in one file, with nothing from elsewhere. It does
not know what is reported.

    page = Page("Where the time goes", "SmolLM2-135M on this CPU")
    page.add("Steps", facts({"steps": 12}), line_chart({"decode": points}, x_label="step", y_label="ms"))
    Path("report.html").write_text(page.html(), encoding="utf-8")

Every text is escaped; what is markup already is `Html`. Charts are SVG, drawn here, once for a wide page and once for a
phone; they need no script and follow the reader's choice of light or dark.
"""

from .charts import Ceiling, Point, Series, line_chart, roofline
from .markup import Cell, Html, bars, details, facts, legend, note, strip, table, text_lines
from .numbers import duration, number, quantity
from .page import Page

__all__ = [
    "Ceiling",
    "Cell",
    "Html",
    "Page",
    "Point",
    "Series",
    "bars",
    "details",
    "duration",
    "facts",
    "legend",
    "line_chart",
    "note",
    "number",
    "quantity",
    "roofline",
    "strip",
    "table",
    "text_lines",
]
