"""The validation table: what each field takes, what it refuses, and by which name."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.config import GenerationConfig
from octavo.engine.errors import RequestError
from octavo.engine.sampling_params import RULES, SamplingParams, check_field

NAN, INF = math.nan, math.inf
NO_FLOATS = (NAN, INF, -INF, True, "1", [1], {}, 10**400)
NO_INTS = (1.0, NAN, True, "5", [1], 2**63, -(2**63), 10**5000)
NO_IDS = (5, True, "5", {}, [-1], [True], ["5"], [1.0], [2**31], [[1]], None)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


ACCEPTED: dict[str, list[Any]] = {
    "n": [1, 2, 128],
    "temperature": [0, 0.0, 1, 1e-300, 2, 2.0],
    "top_p": [1e-9, 0.5, 1, 1.0],
    "top_k": [-1, 0, 1, 50, 2**31 - 1],
    "min_p": [0, 0.5, 1.0],
    "presence_penalty": [-2, 0.0, 2.0],
    "frequency_penalty": [-2.0, 0.1, 2],
    "repetition_penalty": [1e-3, 1, 10],
    "seed": [None, 0, 2**63 - 1],
    "stop": [None, [], "x", "\n", ["a", "b"], ("é" * 256,), ["x"] * 16],
    "stop_token_ids": [None, [], [0], (1, 2), [2**31 - 1], [1] * 256],
    "include_stop_str_in_output": [True, False],
    "ignore_eos": [True, False],
    "max_tokens": [None, 1, 10**6],
    "min_tokens": [0, 5],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "logit_bias": [None, {}, {0: 1}, {5: -100.0, 7: 100}],
    "allowed_token_ids": [None, [0], (3, 1)],
    "bad_words": [None, [], ["damn"]],
    "bad_words_token_ids": [None, [], [[1, 2], [3]]],
    "skip_special_tokens": [True, False],
    "detokenize": [True, False],
    "return_hidden_states": [None, [0], (3, 7)],
    "structured_outputs": [
        *(None, {"json": {"type": "object"}}, {"json": nested(31)}, {"json": {}, "regex": None}, {"json_object": True}),
        *({"regex": "a{3}"}, {"choice": ["a", "é"]}, {"choice": ["a"] * 1024}, {"grammar": 'start: "a"'}),
    ],
    "priority": [0, -5, 2**31 - 1],
    "cache_salt": [None, "a", "x" * 256],
}
REFUSED: dict[str, list[Any]] = {
    "n": [0, -1, 129, 10**9, None, *NO_INTS],
    "temperature": [-1e-9, 2.0000001, None, *NO_FLOATS],
    "top_p": [0, 0.0, -0.5, 1.0000001, None, *(value for value in NO_FLOATS if value is not True), True],
    "top_k": [-2, None, *NO_INTS],
    "min_p": [-0.1, 1.1, None, *NO_FLOATS],
    "presence_penalty": [-2.1, 2.1, None, *NO_FLOATS],
    "frequency_penalty": [-2.1, 2.1, None, *NO_FLOATS],
    "repetition_penalty": [0, 0.0, -1, 10.1, None, *NO_FLOATS],
    "seed": [-1, 2**70, *NO_INTS],
    "stop": ["", [""], ["x"] * 17, ["x" * 257], ["x"] * 100_000, [1], 5, {"a": 1}, "\ud800", [None]],
    "stop_token_ids": [*(value for value in NO_IDS if value is not None), [1] * 257],
    "include_stop_str_in_output": [None, 0, 1, "true"],
    "ignore_eos": [None, 0, 1, "true"],
    "max_tokens": [0, -1, 10**30, *NO_INTS],
    "min_tokens": [-1, 10**30, None, *NO_INTS],
    "logprobs": [-1, 21, *NO_INTS],
    "prompt_logprobs": [-1, 21, *NO_INTS],
    "logit_bias": [
        [],
        {"5": 1},
        {-1: 1},
        {1: NAN},
        {1: INF},
        {1: 100.1},
        {1: True},
        {2**31: 1},
        {True: 1},
        "x",
        dict.fromkeys(range(1025), 0),
    ],
    "allowed_token_ids": [[], *(value for value in NO_IDS if value is not None)],
    "bad_words": [[""], "damn", [1], ["x"] * 257, ["\udfff"]],
    "bad_words_token_ids": [[[]], [1], [[-1]], [[1] * 257], "x", [[1]] * 1025],
    "skip_special_tokens": [None, 0, "false"],
    "detokenize": [None, 0, "false"],
    "return_hidden_states": [[], [-1], [True], 5, [1.0], [65536]],
    "structured_outputs": [
        *({}, [], "json", True, {"json": None}, {"xml": "a"}, {"json": {}, "regex": "a"}, {5: 1}),
        *(
            {"json": value}
            for value in (True, [], "", "[]", "{", '{"a": NaN}', "\ud800", {"a": NAN}, {1: 2}, {"a": {1}})
        ),
        *(
            {"json": value}
            for value in (nested(32), {"title": "x" * 2**16}, '{"title":"' + "x" * 2**16 + '"}', {"a": 10**5000})
        ),
        *({"json_object": value} for value in (False, 1, "true", {})),
        *({kind: value} for kind in ("regex", "grammar") for value in ("", 5, ["a"], "a" * 2**16, "\ud800")),
        *({"choice": value} for value in ([], "ab", [""], [1], ["a"] * 1025, ["a" * 1000] * 100)),
    ],
    "priority": [None, 2**31, -(2**31) - 1, *NO_INTS],
    "cache_salt": ["", "x" * 257, 5, "\ud800"],
}
KEPT_AS = {"top_k": {-1: 0}}


def test_a_schema_may_be_given_as_text() -> None:
    wanted = {"json": {"const": "é", "enum": [1, 2.5, None]}}
    assert SamplingParams(structured_outputs={"json": json.dumps(wanted["json"])}).structured_outputs == wanted
    assert SamplingParams(structured_outputs=wanted).structured_outputs == wanted


def test_the_cases_cover_every_field() -> None:
    assert ACCEPTED.keys() == REFUSED.keys() == RULES.keys()


@pytest.mark.parametrize("name", RULES)
def test_accepted(name: str) -> None:
    for value in ACCEPTED[name]:
        kept = getattr(SamplingParams(**{name: value}), name)
        if name in ("stop", "bad_words", "stop_token_ids"):
            assert kept == ((value,) if isinstance(value, str) else tuple(value or ()))
        elif isinstance(value, (list, tuple)) or (value is None and name == "bad_words_token_ids"):
            assert kept == tuple(tuple(item) if isinstance(item, list) else item for item in value or ())
        else:
            if isinstance(value, dict):
                value = {key: item for key, item in value.items() if item is not None}
            expected = KEPT_AS.get(name, {}).get(value, value) if not isinstance(value, dict) else value or None
            assert kept == expected
            assert type(kept) is not int or not RULES[name].type.startswith("float")


@pytest.mark.parametrize("name", RULES)
def test_refused(name: str) -> None:
    for value in REFUSED[name]:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.param == name
        message = str(caught.value)
        assert message.startswith(f"{name} is ")
        assert message.endswith(RULES[name].allowed)
        assert len(message) < 300
        message.encode()


def test_absurd_values_are_refused_at_once() -> None:
    start = time.perf_counter()
    for _ in range(20):
        with pytest.raises(RequestError):
            SamplingParams(n=10**9)
    assert (time.perf_counter() - start) / 20 < 1e-3


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (1, 1, 0, 0, 1)
    assert params.max_tokens is None
    assert params == SamplingParams(temperature=1.0, top_k=-1, stop=None)
    assert pickle.loads(pickle.dumps(params)) == params


def test_fields_that_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="max_tokens, 3") as caught:
        SamplingParams(min_tokens=4, max_tokens=3)
    assert caught.value.param == "min_tokens"
    with pytest.raises(RequestError) as caught:
        SamplingParams(stop=["x"], detokenize=False)
    assert caught.value.param == "stop"


def test_from_mapping() -> None:
    params = SamplingParams.from_mapping({"logit_bias": {"5": 1, "70000": -2.5}, "temperature": None, "stop": "\n"})
    assert params == SamplingParams(logit_bias={5: 1.0, 70000: -2.5}, stop=["\n"])
    with pytest.raises(RequestError, match="unknown parameter 'temprature'") as caught:
        SamplingParams.from_mapping({"temprature": 1})
    assert caught.value.param == "temprature"
    for key in ("+5", "05", " 5", "5.0", "-1", "٣", "", "1" * 20, 5.0, True, None):
        with pytest.raises(RequestError) as caught:
            SamplingParams.from_mapping({"logit_bias": {key: 1}})
        assert caught.value.param == "logit_bias"
    with pytest.raises(RequestError):
        SamplingParams.from_mapping({"given": []})


def test_an_unknown_key_can_be_sent_back() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_mapping({"\ud800" * 100: 1})
    assert caught.value.param is not None
    caught.value.param.encode()


def test_a_checkpoint_fills_only_what_was_not_given() -> None:
    checkpoint = GenerationConfig(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.1)
    params = SamplingParams.from_mapping({"temperature": 1.0, "top_k": 0}, checkpoint)
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty) == (
        1,
        0,
        0.95,
        0,
        1.1,
    )
    assert params.given == {"temperature", "top_k"}
    assert SamplingParams(top_p=1.0).with_defaults(checkpoint).top_p == 1.0
    assert (
        SamplingParams().with_defaults(GenerationConfig()) == SamplingParams().with_defaults(None) == SamplingParams()
    )
    assert params.with_defaults(GenerationConfig(top_p=0.5, temperature=0.1)).top_p == 0.5
    changed = SamplingParams(seed=3).replace(temperature=0.5, n=2)
    assert (changed.seed, changed.n, changed.given) == (3, 2, {"temperature"})
    assert changed.with_defaults(checkpoint) == SamplingParams(
        seed=3, n=2, temperature=0.5, top_k=20, top_p=0.95, repetition_penalty=1.1
    )


def limits(**changes: int) -> dict[str, int]:
    return {"vocab_size": 100, "max_model_len": 50, "prompt_len": 30, **changes}


def test_max_tokens_in_effect() -> None:
    assert SamplingParams().validate_for(**limits()) == 20
    assert SamplingParams().validate_for(**limits(default_max_tokens=16)) == 16
    assert SamplingParams().validate_for(**limits(default_max_tokens=16, prompt_len=45)) == 5
    assert SamplingParams(max_tokens=20).validate_for(**limits(default_max_tokens=16)) == 20
    assert SamplingParams(n=2, max_tokens=20).validate_for(**limits(max_output_tokens=40)) == 20


@pytest.mark.parametrize(
    ("param", "fields", "changes"),
    [
        ("max_tokens", {"max_tokens": 21}, {}),
        ("min_tokens", {"min_tokens": 21}, {}),
        ("min_tokens", {"min_tokens": 17}, {"default_max_tokens": 16}),
        ("n", {"n": 3, "max_tokens": 20}, {"max_output_tokens": 59}),
        ("prompt", {}, {"prompt_len": 50}),
        ("prompt", {}, {"prompt_len": 0}),
        ("top_k", {"top_k": 101}, {}),
        ("stop_token_ids", {"stop_token_ids": [3, 100]}, {}),
        ("logit_bias", {"logit_bias": {100: 1}}, {}),
        ("allowed_token_ids", {"allowed_token_ids": [99, 100]}, {}),
        ("bad_words_token_ids", {"bad_words_token_ids": [[1], [2, 100]]}, {}),
        ("return_hidden_states", {"return_hidden_states": [0, 4]}, {"num_layers": 4}),
    ],
)
def test_refused_for_a_model(param: str, fields: dict[str, Any], changes: dict[str, int]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**fields).validate_for(**limits(**changes))
    assert caught.value.param == param


def test_a_checkpoints_top_k_may_exceed_a_small_vocabulary() -> None:
    SamplingParams().with_defaults(GenerationConfig(top_k=500)).validate_for(**limits())


def test_the_largest_values_a_model_allows() -> None:
    ids = SamplingParams(
        max_tokens=20, min_tokens=20, top_k=100, stop_token_ids=[99], logit_bias={99: 1}, allowed_token_ids=[99]
    )
    assert ids.replace(bad_words_token_ids=[[99]], return_hidden_states=[3]).validate_for(**limits(num_layers=4)) == 20


def test_bad_words_become_token_ids() -> None:
    vocabulary = {"no": [1], " no": [2], "never": [3, 4], " never": [5, 4]}
    params = SamplingParams(bad_words=["no", "never"], top_k=3, bad_words_token_ids=[[9]]).with_bad_words(
        vocabulary.__getitem__
    )
    assert params.bad_words == ()
    assert params.bad_words_token_ids == ((9,), (1,), (2,), (3, 4), (5, 4))
    assert params.given == {"top_k"}
    assert SamplingParams().with_bad_words(vocabulary.__getitem__) == SamplingParams()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def outcome(build: Callable[[], Any]) -> tuple[Any, RequestError | None]:
    try:
        return build(), None
    except RequestError as error:
        return None, error


@given(name=st.sampled_from(sorted(RULES)), value=VALUES)
def test_any_value_is_kept_or_refused_by_name(name: str, value: Any) -> None:
    """Nothing but RequestError escapes, and what is kept is a value the table takes again."""
    kept, error = outcome(lambda: check_field(name, value))
    if error is not None:
        assert error.param == name
        assert RULES[name].allowed in str(error)
    else:
        assert check_field(name, kept) == kept, "NaN was let through, or the form kept is not one that is taken"


@given(mapping=st.dictionaries(st.sampled_from(sorted(RULES)) | st.text(max_size=4), VALUES, max_size=4))
def test_any_mapping_is_taken_or_refused(mapping: dict[str, Any]) -> None:
    params, error = outcome(lambda: SamplingParams.from_mapping(mapping))
    if error is not None:
        assert error.param in mapping or error.param in RULES
    else:
        assert mapping.keys() <= RULES.keys()
        assert SamplingParams.from_mapping({name: getattr(params, name) for name in RULES}) == params
