"""This module holds the messages between an engine and its front, and their form on a pipe. It does not know who sends
them or how they travel.

On a pipe a message is one frame: its length in eight bytes, then msgpack. Arrays are bytes, with their type and shape
unless these are the usual ones; nothing in a frame can name code to run. Within one process the same objects are handed
over as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from ..config import EngineConfig, GenerationConfig
from ..errors import CapacityError, CheckpointError, ConfigError, EngineDeadError, OctavoError
from ..events import KVSnapshot, RequestEvent, StepEvent
from ..resolve import Choice
from ..sampling_params import RULES, SamplingParams
from ..startup import Engine, StartupPhase
from ..step import EngineOutput
from ..text.tokenizer import TokenizerParts

__all__ = [
    "Abort",
    "AddRequest",
    "Call",
    "Died",
    "EngineInfo",
    "Finish",
    "Frames",
    "FromEngine",
    "Heartbeat",
    "Hello",
    "LogLine",
    "News",
    "PhaseBegan",
    "Ready",
    "Refusal",
    "Reply",
    "Shutdown",
    "StartFailed",
    "ToEngine",
    "WeightsRead",
    "engine_info",
    "from_engine",
    "packed_params",
    "to_engine",
    "to_frame",
    "unpacked_params",
]

_HEADER_BYTES = 8
MAX_FRAME_BYTES = 1 << 40
"""A longer frame is a broken pipe, not a message."""


class _Message(msgspec.Struct, array_like=True, tag=True):
    """A message; its class's name goes first."""


class Hello(_Message):
    """The first message to an engine: what to start."""

    config: EngineConfig
    factory: str
    """ "module:function", called as `start_engine` is."""


class AddRequest(_Message):
    """A request, checked and complete."""

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    """What differs from the defaults; see `packed_params`."""
    given: list[str]
    stream: bool
    cache_domain: str
    arrived_s: float | None = None


class Abort(_Message):
    """End these requests, known or not; `News.aborted` says when they are gone."""

    request_ids: list[str]


class Finish(_Message):
    """End a sequence at a stop string, keeping its first tokens."""

    request_id: str
    index: int
    num_output_tokens: int


class Call(_Message):
    """Ask for something that gets one `Reply`."""

    call_id: int
    what: Literal["snapshot", "reset_prefix_cache"]


class Shutdown(_Message):
    """End the engine, whatever it is doing."""


ToEngine = Hello | AddRequest | Abort | Finish | Call | Shutdown


class PhaseBegan(_Message):
    """A phase of the start-up has begun."""

    name: str


class WeightsRead(_Message):
    """How much of the weights is read."""

    num_bytes: int
    total_bytes: int


class Ready(_Message):
    """The engine takes requests."""

    info: EngineInfo
    tokenizer: TokenizerParts | None


class StartFailed(_Message):
    """The engine could not be started: an error by its class and what it was made of."""

    kind: str
    arguments: list[str | None]

    @classmethod
    def of(cls, error: Exception) -> StartFailed:
        """Describe an error."""
        if isinstance(error, CheckpointError):
            return cls("CheckpointError", [error.file, error.reason, error.tensor])
        kind = type(error).__name__
        if isinstance(error, OctavoError) and kind in _START_ERRORS:
            return cls(kind, [str(error)])
        return cls("EngineDeadError", [f"the engine failed to start: {error!r}"])

    def error(self) -> OctavoError:
        """Return the same error again."""
        return _START_ERRORS[self.kind](*self.arguments)


_START_ERRORS: dict[str, type[OctavoError]] = {
    kind.__name__: kind for kind in (CapacityError, CheckpointError, ConfigError, EngineDeadError)
}


class Refusal(msgspec.Struct, array_like=True):
    """A request that the engine has not taken."""

    request_id: str
    message: str
    param: str | None
    is_busy: bool = False
    """It may be taken later: see `BusyError`."""


class News(_Message):
    """All that has happened since the last news: of one step, or of messages between two."""

    outputs: list[EngineOutput]
    refusals: list[Refusal]
    aborted: list[str]
    """Requests of `Abort` that hold nothing any more."""
    events: list[RequestEvent]
    step: StepEvent | None
    num_events_before_step: int


class Heartbeat(_Message):
    """The engine's process lives; from a thread of its own, also in the middle of a step."""

    time_s: float
    progress_s: float | None
    """When the last step ended, or work began after none, as `time_s` on the monotonic clock; None: nothing to do."""


class LogLine(_Message):
    """A line for the front's log, which nobody would see in the engine's own process."""

    logger: str
    level: int
    text: str


class Reply(_Message):
    """The answer to a `Call`."""

    call_id: int
    snapshot: KVSnapshot | None


class Died(_Message):
    """The engine gives up; nothing comes after this."""

    reason: str


FromEngine = PhaseBegan | WeightsRead | Ready | StartFailed | News | Heartbeat | LogLine | Reply | Died


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What there is to know of a running engine without being in its process."""

    config: EngineConfig
    device: str
    dtype: str
    backend: str
    vocab_size: int
    """Width of the logits."""
    num_layers: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    overlap: bool
    graphs: bool
    kv_cache_dtype: str
    num_blocks: int
    block_size: int
    eos_token_ids: tuple[int, ...]
    generation_config: GenerationConfig
    fingerprint: str
    phases: tuple[StartupPhase, ...]
    choices: tuple[Choice, ...]
    pid: int
    """Of the process it runs in."""

    @property
    def model(self) -> str:
        """The model, as it was asked for."""
        return self.config.model

    @property
    def num_slots(self) -> int:
        """Tokens that the KV pool holds."""
        return self.num_blocks * self.block_size


def engine_info(engine: Engine, pid: int) -> EngineInfo:
    """Describe an engine that runs in process `pid`."""
    resolved, limits = engine.resolved, engine.core.scheduler.limits
    return EngineInfo(
        config=engine.config,
        device=resolved.device,
        dtype=resolved.dtype,
        backend=resolved.backend,
        vocab_size=limits.vocab_size,
        num_layers=engine.model_config.num_layers,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        overlap=resolved.overlap,
        graphs=resolved.graphs,
        kv_cache_dtype=resolved.kv_cache_dtype,
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        eos_token_ids=tuple(sorted(limits.eos_token_ids)),
        generation_config=engine.generation_config,
        fingerprint=engine.fingerprint,
        phases=engine.phases,
        choices=resolved.choices,
        pid=pid,
    )


def packed_params(params: SamplingParams) -> tuple[dict[str, Any], list[str]]:
    """Return what differs from the defaults, and which fields the caller gave."""
    values = {name: value for name in RULES if (value := getattr(params, name)) != getattr(_DEFAULTS, name)}
    return values, sorted(params.given)


def unpacked_params(values: dict[str, Any], given: list[str]) -> SamplingParams:
    """Build the parameters again: checked like any others."""
    params = SamplingParams(**values)
    object.__setattr__(params, "given", frozenset(given))
    return params


_DEFAULTS = SamplingParams()
_IDS = np.dtype(np.int32)
"""Three arrays of it come with every step, so these are bare bytes: read in a third of the time."""


def _encode_other(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype == _IDS and value.ndim == 1:
            return value.tobytes()
        return [value.dtype.str, value.shape, np.ascontiguousarray(value).data.cast("B")]
    raise NotImplementedError(f"{type(value).__name__} cannot travel in a message")


def _decode_other(type_: Any, value: Any) -> Any:
    if type(value) is bytes:
        return np.frombuffer(value, _IDS)
    dtype, shape, data = value
    return np.frombuffer(data, dtype=dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
_decode_to_engine = msgspec.msgpack.Decoder(ToEngine, dec_hook=_decode_other).decode
_decode_from_engine = msgspec.msgpack.Decoder(FromEngine, dec_hook=_decode_other).decode


def to_frame(message: ToEngine | FromEngine) -> bytearray:
    """Return a message as it goes over a pipe."""
    buffer = bytearray(_HEADER_BYTES)
    _encoder.encode_into(message, buffer, _HEADER_BYTES)
    buffer[:_HEADER_BYTES] = (len(buffer) - _HEADER_BYTES).to_bytes(_HEADER_BYTES, "little")
    return buffer


class Frames:
    """Cuts what comes out of a pipe into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take what was read; yield the content of each frame that is complete with it.

        Raises:
            EngineDeadError: this is no frame.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _HEADER_BYTES:
            content = start + _HEADER_BYTES
            end = content + int.from_bytes(buffer[start:content], "little")
            if end - content > MAX_FRAME_BYTES:
                raise EngineDeadError(f"a message of {end - content} bytes; allowed: {MAX_FRAME_BYTES}")
            if len(buffer) < end:
                break
            yield bytes(memoryview(buffer)[content:end])
            start = end
        del buffer[:start]


def to_engine(content: bytes) -> ToEngine:
    """Read a message to the engine."""
    message: ToEngine = _decode_to_engine(content)
    return message


def from_engine(content: bytes) -> FromEngine:
    """Read a message from the engine."""
    message: FromEngine = _decode_from_engine(content)
    return message
