"""Messages come out of a pipe as they went in, however it cuts them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.config import EngineConfig
from octavo.engine.errors import CapacityError, CheckpointError, ConfigError, EngineDeadError
from octavo.engine.events import EventKind, KVSnapshot, RequestEvent, RunningSequence, StepEvent, WaitingSequence
from octavo.engine.process.fake import fake_engine, fake_tokenizer
from octavo.engine.process.messages import (
    Abort,
    AddRequest,
    Call,
    Died,
    Finish,
    Frames,
    Heartbeat,
    Hello,
    LogLine,
    News,
    PhaseBegan,
    Ready,
    Refusal,
    Reply,
    Shutdown,
    StartFailed,
    WeightsRead,
    engine_info,
    from_engine,
    packed_params,
    to_engine,
    to_frame,
    unpacked_params,
)
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import EngineOutput, FinishReason, LogprobEntry, RequestMetrics
from octavo.engine.text import Tokenizer

PARAMS = SamplingParams(
    temperature=0.5, top_k=7, stop="end", logit_bias={3: 1.5}, bad_words_token_ids=[[1, 2]], allowed_token_ids=[1, 4]
)
TO_ENGINE = [
    Hello(EngineConfig.from_settings({"model": "m", "block_size": 16, "preempt_every": 2, "seed": 2**63 - 1}), "a:b"),
    AddRequest("request-ü", [0, 5, 2**31 - 1], {"top_k": 7, "logit_bias": {3: 1.5}}, ["top_k"], True, "domain"),
    Abort(["a", "b"]),
    Finish("a", 3, 17),
    Call(2**40, "snapshot"),
    Shutdown(),
]
ENTRY = LogprobEntry(-math.inf, 1, [5, 7], [-0.25, -1.5])
METRICS = RequestMetrics(1.0, 2.0, None, 4.0, 5, 6)
OUTPUTS = [
    EngineOutput("a", 0, [1], new_logprobs=[]),
    EngineOutput("b", 1, [], FinishReason.ERROR, 7, "why", "stop", [ENTRY], [ENTRY, ENTRY], None, METRICS),
]
EVENT = RequestEvent(EventKind.FINISHED, 1.5, 3, "a", 0, 4, 5, 6, 7, "stop")
ARRAY = np.array([3, 1, 2], dtype=np.int32)
STEP = StepEvent(3, 1.0, 2.0, 3.0, 4.0, ARRAY, ARRAY[:0], ARRAY[::2], 5, 6, 7, "failed")
SNAPSHOT = KVSnapshot(
    1.0,
    np.array([0, 1, 3], np.uint8),
    9,
    [WaitingSequence("a", 0, "no row free", 0.5)],
    [RunningSequence("b", 0, 1, 5, 4)],
)


def from_engine_messages() -> list[Any]:
    engine = fake_engine(EngineConfig())
    assert engine.tokenizer is not None
    return [
        PhaseBegan("load"),
        WeightsRead(1 << 40, 1 << 41),
        Ready(engine_info(engine, 5), engine.tokenizer.parts()),
        StartFailed("ConfigError", ["no"]),
        Heartbeat(1.0, None),
        LogLine("octavo.engine", 20, "a line"),
        Died("reason"),
    ]


def frame_of(message: Any) -> bytes:
    return bytes(to_frame(message))


def content_of(message: Any) -> bytes:
    (content,) = Frames().feed(frame_of(message))
    return content


@pytest.mark.parametrize("message", TO_ENGINE, ids=lambda message: type(message).__name__)
def test_message_to_engine(message: Any) -> None:
    assert to_engine(content_of(message)) == message


@pytest.mark.parametrize("message", from_engine_messages(), ids=lambda message: type(message).__name__)
def test_message_from_engine(message: Any) -> None:
    assert from_engine(content_of(message)) == message


def test_news() -> None:
    read = from_engine(content_of(News(OUTPUTS, [Refusal("c", "no", None, True)], ["d"], [EVENT], STEP, 1)))
    assert isinstance(read, News)
    assert read.outputs == OUTPUTS
    assert read.refusals == [Refusal("c", "no", None, True)]
    assert (read.aborted, read.events, read.num_events_before_step) == (["d"], [EVENT], 1)
    assert isinstance(read.step, StepEvent)
    for sent, got in zip(STEP, read.step, strict=True):
        assert type(got) is type(sent)
        assert np.array_equal(got, sent)
        assert not isinstance(sent, np.ndarray) or got.dtype == sent.dtype


def test_arrays_of_all_kinds() -> None:
    states = np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2]
    read = from_engine(content_of(News([EngineOutput("a", 0, [1], hidden_states=states)], [], [], [], None, 0)))
    assert isinstance(read, News)
    assert np.array_equal(read.outputs[0].hidden_states, states)  # type: ignore[arg-type]
    reply = from_engine(content_of(Reply(3, SNAPSHOT)))
    assert isinstance(reply, Reply)
    assert reply.snapshot is not None
    assert np.array_equal(reply.snapshot.blocks, SNAPSHOT.blocks)
    assert reply.snapshot._replace(blocks=SNAPSHOT.blocks) == SNAPSHOT
    assert from_engine(content_of(Reply(4, None))) == Reply(4, None)


@given(st.lists(st.integers(1, 400), max_size=30))
def test_frames_survive_any_cut(cuts: list[int]) -> None:
    data = b"".join(map(frame_of, TO_ENGINE))
    frames, read, position = Frames(), [], 0
    for size in [*cuts, len(data)]:
        read += [to_engine(content) for content in frames.feed(data[position : position + size])]
        position += size
    assert read == TO_ENGINE


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(EngineDeadError, match="a message of"):
        list(Frames().feed(b"HTTP/1.1 200 OK\r\n"))


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x91\xa5other", msgspec.msgpack.encode(["Finish", "a", "b", 1])])
def test_what_is_no_message_is_refused(content: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        to_engine(content)


def test_params_stay_what_they_were() -> None:
    given_defaults = SamplingParams(top_k=0, temperature=1.0)
    filled = SamplingParams().replace(max_tokens=5)
    for params in (PARAMS, SamplingParams(), given_defaults, filled):
        values, given = msgspec.msgpack.decode(msgspec.msgpack.encode(packed_params(params)), strict=False)
        again = unpacked_params(values, given)
        assert again == params
        assert again.given == params.given


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a setting"),
        CapacityError("too large"),
        CheckpointError("file", "reason"),
        CheckpointError("file", "reason", "tensor"),
        EngineDeadError("dead"),
    ],
    ids=repr,
)
def test_errors_travel(error: Exception) -> None:
    failed = from_engine(content_of(StartFailed.of(error)))
    assert isinstance(failed, StartFailed)
    again = failed.error()
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_a_bug_is_a_dead_engine() -> None:
    error = StartFailed.of(KeyError("x")).error()
    assert isinstance(error, EngineDeadError)
    assert "KeyError('x')" in str(error)


def test_tokenizer_travels() -> None:
    tokenizer = fake_tokenizer()
    again = Tokenizer.from_parts(tokenizer.parts())
    text = "a <|im_start|> über \x00"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.encode(text, plain_spans=[(0, len(text))]) == tokenizer.encode(text, plain_spans=[(0, len(text))])
    for name in ("vocab_size", "special_token_ids", "control_tokens", "named_tokens", "chat_template", "eos_token_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.parts() == tokenizer.parts()
