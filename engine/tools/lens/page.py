"""This module holds the page of a lens: a grid to walk through, and at which layer answers appear. It does not know
where a record comes from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..report import Cell, Html, Page, Series, details, facts, line_chart, table

__all__ = ["lens_page"]

_FOLDER = Path(__file__).parent
_GUIDE = (
    "Each column is a token that the model reads, each row the hidden state that a layer leaves there; 0 is the "
    "embedding. A cell holds the token that the model would say if it stopped there: the hidden state through the "
    "final norm and the head. Early layers are not trained to be read so: what they say is a hint, not a thought.",
    "The answer of a column is the token that was generated there. Inside the prompt, which goes on by itself, it is "
    "what the last layer says. Cells that say the answer already are bold.",
    "KL is the Kullback-Leibler divergence of a cell's distribution from the last layer's, in nats: what is lost by "
    "stopping there. The norm is the hidden state's Euclidean length and the cosine compares it with the layer before; "
    "of the last layer both are taken before the final norm. A rank counts the tokens that are at least as likely.",
    "Where two paths ran, the second was given the first one's tokens, in the same steps; their difference is that of "
    "the hidden states, |a − b| / |a|.",
)


def lens_page(record: Mapping[str, Any]) -> str:
    """Return the page of a record that `lens_record` made: one file with nothing from elsewhere."""
    num_prompt, tokens, ids = record["num_prompt_tokens"], record["tokens"], record["token_ids"]
    text = "".join(
        f'<span class="{"prompt" if i < num_prompt else "output"}">{escape(tokens[str(token_id)])}</span>'
        for i, token_id in enumerate(ids)
    )
    num_shown = len(record["positions"])
    known = {
        "prompt": f"{num_prompt:,} tokens",
        "output": f"{len(ids) - num_prompt:,} tokens, ended by {record['finish_reason']}",
        "layers read": f"{len(record['layers'])} of {record['num_layers'] + 1}",
        "positions read": f"{num_shown:,} of {record['positions'][-1] + 1:,}",
        "paths": ", ".join(path["backend"] for path in record["paths"]),
        "runs in": f"{record['dtype']} on {record['device']}",
    }
    page = Page(f"{record['model']}, layer by layer")
    page.add("", Html(f'<div class="text">{text}</div>'), facts(known))
    if record["error"]:
        page.add("", Html(f'<p class="bad">{escape(record["error"])}</p>'))
    page.add("What each layer would say", Html(_grid(record)), details("How to read it", *_GUIDE, *_alone(record)))
    page.add("At which layer the answer appears", _emergence(record), _answers(record))
    return page.html()


def _alone(record: Mapping[str, Any]) -> list[str]:
    return [f"Only {record['paths'][0]['backend']} ran: {record['why_alone']}."] if record["why_alone"] else []


def _grid(record: Mapping[str, Any]) -> str:
    # In a script element only "</" and "<!" could end the data.
    data = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    style, markup, script = ((_FOLDER / f"grid.{kind}").read_text(encoding="utf-8") for kind in ("css", "html", "js"))
    return (
        f"<style>\n{style}</style>\n{markup}"
        f'<script type="application/json" id="record">{data}</script>\n<script type="module">\n{script}</script>'
    )


def _emergence(record: Mapping[str, Any]) -> Html:
    """Return, over the layers, the probability of the answers: the median, and the middle half of the positions."""
    values = np.array(record["paths"][0]["readings"]["answer_probability"], dtype=np.float64)  # [R, P]
    is_output = np.array([position >= record["num_prompt_tokens"] - 1 for position in record["positions"]])
    series = []
    for name, chosen in (("output", is_output), ("prompt", ~is_output)):
        part = values[:, chosen & np.isfinite(values).all(axis=0)]
        if part.size:
            low, middle, high = np.quantile(part, (0.25, 0.5, 0.75), axis=1).tolist()
            points = list(zip(map(float, record["layers"]), middle, strict=True))
            series.append(Series(name, points, list(zip(low, high, strict=True))))
    title = "Probability of the answer: the median, and the middle half of the positions"
    return line_chart(series, title=title, x_label="layer", y_label="probability")


def _answers(record: Mapping[str, Any]) -> Html:
    """Return a row for each token of the output: how sure the model was, and from which layer on it would say it."""
    first, num_prompt = record["positions"][0], record["num_prompt_tokens"]
    last_row = record["paths"][0]["readings"]["answer_probability"][-1]
    labels = [record["tokens"][str(token_id)] for token_id in record["token_ids"]]
    rows: Sequence[Sequence[Any]] = [
        (
            position + 1,
            labels[position],
            Cell(labels[position + 1], "good"),
            "not finite" if last_row[position - first] is None else f"{last_row[position - first]:.1%}",
            "never" if (settled := record["settled"][position - first]) is None else settled,
        )
        for position in record["positions"]
        if num_prompt - 1 <= position < len(record["token_ids"]) - 1
    ]
    return table(("position", "after", "output", "probability", "from layer"), rows)
