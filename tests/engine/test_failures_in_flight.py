"""This module checks steps that break anywhere on their way, while another is out: each ends those that were in it, and
nobody else. It does not know what breaks them.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from octavo.engine.llm import LLM
from octavo.engine.models.decoder import Decoder
from octavo.engine.runner.draw import Draw
from octavo.engine.runner.input_batch import InputBatch
from octavo.engine.runner.sampler import Sampler
from octavo.engine.runner.staging import HostCopy
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import FinishReason

from ..checkpoints import make_prompts

POINTS: tuple[tuple[type, str], ...] = (
    (InputBatch, "apply"),
    (InputBatch, "upload"),
    (InputBatch, "note"),
    (Sampler, "add"),
    (Sampler, "prepare"),
    (Sampler, "_params"),
    (Draw, "__init__"),
    (Decoder, "forward"),
    (Decoder, "logits"),
    (Draw, "_remember"),
    (HostCopy, "wait"),
)
"""What a step calls on its way, once at least."""
WISHES: tuple[dict[str, Any], ...] = (
    {},
    {"structured_outputs": {"regex": "([a-z][0-9])+"}},
    {"bad_words_token_ids": [[token, token + 1] for token in range(256)]},
    {"repetition_penalty": 1.3, "logprobs": 1},
)
"""Half of the requests look back, so that the sampling of a step waits for the one before."""
PROMPTS = make_prompts([9 + 7 * i % 30 for i in range(6)], seed=11)
PARAMS = [
    SamplingParams(temperature=0, max_tokens=4 + 3 * i % 8, ignore_eos=True, **WISHES[i % len(WISHES)])
    for i in range(len(PROMPTS))
]


class Break:
    """Raises in one of the calls of a method, before it has done anything or after."""

    def __init__(self, patch: pytest.MonkeyPatch, point: tuple[type, str], error: BaseException, rng: Random) -> None:
        owner, name = point
        right, self.num_left, after = getattr(owner, name), rng.randrange(2, len(PROMPTS)), rng.random() < 0.5

        def broken(this: Any, *args: Any, **named: Any) -> Any:
            self.num_left -= 1
            if self.num_left == 0 and not after:
                raise error
            result = right(this, *args, **named)
            if self.num_left == 0:
                raise error
            return result

        patch.setattr(owner, name, broken)


def run(llm: LLM, rng: Random) -> dict[str, tuple[FinishReason | None, list[int], str | None]]:
    """Ask everything, two requests at a time, and return how each ended."""
    core = llm.engine.core
    asked, ended, tokens = iter(zip(PROMPTS, PARAMS, strict=True)), dict[str, Any](), dict[str, list[int]]()
    num_asked = 0
    while True:
        for prompt, params in [each for _ in range(rng.randrange(3)) if (each := next(asked, None)) is not None]:
            core.add_request(f"r{num_asked}", prompt, llm._complete(params), stream=rng.random() < 0.5)
            num_asked += 1
        if num_asked == len(PROMPTS) and not core.has_unfinished:
            return ended
        try:
            news = core.step()
        except KeyboardInterrupt:
            news = []
        for each in news:
            assert each.request_id not in ended, "told after its end"
            tokens.setdefault(each.request_id, []).extend(each.new_token_ids)
            if each.finish_reason is not None:
                ended[each.request_id] = each.finish_reason, tokens[each.request_id], each.error
        core.scheduler.check_integrity()


@pytest.mark.parametrize("error", [RuntimeError("broken here"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0].__name__}.{point[1]}")
def test_a_step_that_breaks_ends_those_in_it_and_nobody_else(
    make_llm: Callable[..., LLM],
    expected: dict[str, Any],
    point: tuple[type, str],
    error: BaseException,
    count: Callable[[int, int], int],
    seed: int,
) -> None:
    for trial in range(count(1, 10)):
        rng = Random(f"{seed} {point} {trial}")
        settings = {"graphs": rng.random() < 0.5, "max_num_batched_tokens": rng.choice([16, 64]), "max_num_seqs": 4}
        llm = make_llm(overlap=True, kv_cache_tokens=rng.choice([128, 1024]), max_model_len=64, **settings)
        with pytest.MonkeyPatch.context() as patch:
            broken = Break(patch, point, error, rng)
            ended = run(llm, rng)
        assert broken.num_left <= 0, "it did not come to that"
        assert ended.keys() == expected.keys()
        for request_id, (reason, tokens, told) in ended.items():
            if reason is FinishReason.ERROR:
                assert "broken here" in str(told) or "interrupted" in str(told), told
                assert tokens == expected[request_id][1][: len(tokens)]
            else:
                assert (reason, tokens) == expected[request_id][:2], request_id
        assert sum(reason is FinishReason.ERROR for reason, _, _ in ended.values()) < len(ended)
        assert run(llm, rng) == expected
        assert llm.stats.num_free_blocks == llm.engine.core.scheduler.limits.num_blocks


@pytest.fixture(scope="module")
def expected(tiny_folder: Any) -> dict[str, Any]:
    """How each ends in an engine that runs one step at a time."""
    llm = LLM(str(tiny_folder), invariant=True, device="cpu", block_size=16, kv_cache_tokens=1024, overlap=False)
    return run(llm, Random(0))
