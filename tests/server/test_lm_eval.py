"""What lm-evaluation-harness's `local-completions` asks, and how it reads the answers, in our words.

To score continuations it sends batches of token lists with `echo`, one log-probability and one token to generate, and
sums the log-probabilities from the context's length to the last token but the generated one; a continuation is greedy
where each of its tokens is the likeliest of `top_logprobs`. To generate it sends `max_tokens`, `temperature`, `stop`
and `seed`, and reads the texts in the order of `index`.
"""

from __future__ import annotations

import json
import math
from typing import Any

from octavo.engine.llm import LLM
from octavo.engine.sampling_params import SamplingParams

from .raw import post
from .serving import Running


def _ask(running: Running, body: dict[str, Any]) -> Any:
    response = post(running, "/v1/completions", {"model": "tiny", "seed": 1234, **body}, {"Authorization": "Bearer x"})
    assert response.status == 200, response.body
    return json.loads(response.body)


def test_loglikelihood(tiny: Running, tiny_llm: LLM) -> None:
    pairs = [([64, 65, 66], [67, 68]), ([70], [71, 72, 73]), ([80, 81], [82])]
    greedy = tiny_llm.generate([90, 91], SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].token_ids
    pairs.append(([90, 91], list(greedy)))
    body = {"prompt": [a + b for a, b in pairs], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    choices = sorted(_ask(tiny, body)["choices"], key=lambda choice: choice["index"])
    for (context, continuation), choice in zip(pairs, choices, strict=True):
        logprobs = choice["logprobs"]
        scored = logprobs["token_logprobs"][len(context) : -1]
        tops = logprobs["top_logprobs"][len(context) : -1]
        is_greedy = all(score == max(top.values()) for score, top in zip(scored, tops, strict=True))
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        entries = tiny_llm.generate(context + continuation, params)[0].prompt_logprobs
        assert entries is not None
        expected = [entry for entry in entries[len(context) :] if entry is not None]
        assert math.isclose(sum(scored), sum(entry.logprob for entry in expected), abs_tol=1e-6)
        assert is_greedy == all(entry.rank == 1 for entry in expected)
    assert all(top == max(tops.values()) for top, tops in zip(scored, tops, strict=True)), "the last one was greedy"


def test_rolling_loglikelihood_of_texts(tiny: Running) -> None:
    body = {"prompt": ["in the th", "x"], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    for text, choice in zip(body["prompt"], _ask(tiny, body)["choices"], strict=True):  # type: ignore[call-overload]
        tokens = choice["logprobs"]["tokens"]
        assert "".join(tokens[:-1]) == text
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["text_offset"]) == len(tokens)


def test_generate_until(tiny: Running) -> None:
    prompts = [[64, 65], [70, 71, 72]]
    body = {"prompt": prompts, "max_tokens": 12, "temperature": 0, "stop": ["\n\n", "<eos>", "Q:"]}
    choices = _ask(tiny, body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    for prompt, choice in zip(prompts, choices, strict=True):
        alone = _ask(tiny, body | {"prompt": [prompt]})["choices"][0]
        assert choice["text"] == alone["text"]
