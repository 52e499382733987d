"""Answers made of news, however they are cut: against the text of all tokens and the first stop string in it."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import EngineOutput, FinishReason, LogprobEntry
from octavo.engine.text import Detokenizer, StopMatcher, Tokenizer
from octavo.engine.text.output_processor import OutputProcessor

STOPS = ["ab", "é", "\n\n", "🦜"]


def answer_of(tokenizer: Tokenizer, params: SamplingParams, ids: list[int], cuts: list[int], **end: Any) -> Any:
    """Return the answer to news that are cut there, and the number of tokens that the engine was told to keep."""
    texts = OutputProcessor(tokenizer)
    answer = texts.add("a", None, [1], params)
    bounds = [0, *cuts, len(ids)]
    told = None
    for start, stop in itertools.pairwise(bounds):
        last = stop == len(ids)
        entries = [LogprobEntry(-float(token_id), 1, [], []) for token_id in ids[start:stop]]
        news = EngineOutput("a", 0, ids[start:stop], new_logprobs=entries, **(end if last else {}))
        _, found = texts.process([news])
        for each in found:
            assert told is None, "a sequence was stopped twice"
            told = each.num_output_tokens
        if last:
            break
    return answer.outputs[0], told


def shown_one_by_one(tokenizer: Tokenizer, params: SamplingParams, ids: list[int]) -> tuple[str, str | None, int]:
    """Return the text, the stop string and the number of tokens, by the definition: token after token."""
    stream, matcher, text = Detokenizer(tokenizer), StopMatcher(params.stop, params.include_stop_str_in_output), ""
    for count, token_id in enumerate(ids, 1):
        result = matcher.append(stream.append([token_id]), may_end=count > params.min_tokens)
        text += result.text
        if result.hit is not None:
            return text, result.hit, count
    result = matcher.append(stream.finish(), may_end=len(ids) > params.min_tokens)
    return text + result.text + ("" if result.hit else matcher.finish()), result.hit, len(ids)


def test_answers_do_not_depend_on_how_news_are_cut(smollm: Tokenizer, examples: Any) -> None:
    likely = [token_id for word in ("a", "b", "ab", " ab", "é", "\n", "\n\n", "🦜") for token_id in smollm.encode(word)]
    ids = st.lists(st.one_of(st.sampled_from(likely), st.integers(0, smollm.vocab_size - 1)), min_size=1, max_size=20)

    @examples(150, 3000)
    @given(ids, st.lists(st.sampled_from(STOPS), max_size=2), st.integers(0, 4), st.booleans(), st.data())
    def check(ids: list[int], stops: list[str], min_tokens: int, include: bool, data: st.DataObject) -> None:
        params = SamplingParams(
            stop=stops, min_tokens=min_tokens, max_tokens=100, include_stop_str_in_output=include, logprobs=0
        )
        text, hit, num_tokens = shown_one_by_one(smollm, params, ids)
        cuts = (
            sorted(data.draw(st.lists(st.integers(1, len(ids) - 1), max_size=20, unique=True))) if len(ids) > 1 else []
        )
        answer, told = answer_of(smollm, params, ids, cuts, finish_reason=FinishReason.LENGTH)
        assert (answer.text, answer.token_ids) == (text, ids[:num_tokens])
        assert [entry.logprob for entry in answer.logprobs] == [-float(token_id) for token_id in ids[:num_tokens]]
        expected = (FinishReason.LENGTH, None) if hit is None else (FinishReason.STOP, hit)
        assert (answer.finish_reason, answer.stop_reason) == expected
        assert told in (None, num_tokens)

    check()


def test_a_stop_token_is_a_token_and_no_text(smollm: Tokenizer) -> None:
    ids = smollm.encode("one two")
    for stops, cuts in itertools.product([[], ["zzz"]], [[], [1], list(range(1, len(ids)))]):
        for include in (False, True):
            params = SamplingParams(stop=stops, stop_token_ids=[ids[-1]], include_stop_str_in_output=include)
            end = {"finish_reason": FinishReason.STOP, "stop_reason": ids[-1]}
            answer, told = answer_of(smollm, params, ids, cuts, **end)
            assert answer.text == smollm.decode(ids if include else ids[:-1])
            assert (answer.token_ids, answer.stop_reason, told) == (ids, ids[-1], None)


def test_an_abort_leaves_the_text_as_it_was_seen(smollm: Tokenizer) -> None:
    ids = smollm.encode("one 🦜")[:-1]
    answer, _ = answer_of(smollm, SamplingParams(), ids, [], finish_reason=FinishReason.ABORT)
    assert answer.text == "one "
