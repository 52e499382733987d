"""Reading requests: no line whatsoever raises, and every one that holds something is accounted for."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.cli.requests import BadRequest, BatchRequest, Requests
from octavo.engine.sampling_params import RULES

KEYS = st.sampled_from(["id", "prompt", "prompt_token_ids", "messages", "other", *RULES])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
LINES = st.lists(
    st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"")) | st.dictionaries(KEYS, JSON, max_size=4),
    max_size=8,
)


@given(LINES)
def test_any_lines_give_requests_or_refusals(lines: list[bytes | dict[str, object]]) -> None:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    reader = Requests([line + b"\n" for line in raw], "jsonl", sampling={"top_k": 5}, chat=False, seed=0)
    found = list(reader)
    places = [each.line for each in found]
    assert places == sorted(set(places))
    blank = {number for number, line in enumerate(raw, 1) if not line.decode("utf-8-sig", errors="replace").strip()}
    assert set(range(1, len(raw) + 1)) - set(places) <= blank
    ids = [each.id for each in found if each.id is not None]
    assert len(ids) == len(set(ids))
    for each in found:
        if isinstance(each, BadRequest):
            assert each.error.startswith(f"line {each.line}: ")
        else:
            assert each.params.seed is not None


def request(line: str, **changes: object) -> BatchRequest:
    named: dict[str, object] = {"sampling": {}, "chat": False, "seed": 0}
    (found,) = Requests([line.encode()], "jsonl", **(named | changes))  # type: ignore[arg-type]
    assert isinstance(found, BatchRequest)
    return found


def test_seeds_come_from_the_id_and_the_engine_s_seed_alone() -> None:
    one = request('{"id": 1, "prompt": "A"}')
    assert request('{"prompt": "B", "id": 1, "max_tokens": 3}').params.seed == one.params.seed
    assert request('{"id": "1", "prompt": "A"}').params.seed != one.params.seed
    assert request('{"id": 1, "prompt": "A"}', seed=1).params.seed != one.params.seed
    assert request('{"id": 1, "prompt": "A", "seed": 7}').params.seed == 7
    assert request('{"id": 1, "prompt": "A"}', sampling={"seed": 7}).params.seed == 7


def test_digests_are_of_what_the_line_says() -> None:
    one = request('{"id": 1, "prompt": "A"}')
    assert request('{"prompt": "A"}', sampling={"top_k": 3}).digest == one.digest
    assert request('{"prompt": "A", "top_k": 3}').digest != one.digest
    assert request('{"prompt": "B"}').digest != one.digest


def test_chat_makes_plain_prompts_a_user_s_message() -> None:
    assert request('{"prompt": "A"}', chat=True).prompt == [{"role": "user", "content": "A"}]
    assert request('{"prompt_token_ids": [5]}', chat=True).prompt == [5]
