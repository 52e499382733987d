"""This module checks a runner with two steps in flight: tokens that stay on the device, whose they are, and when
sampling is launched. It does not know a scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from octavo.engine.models.decoder import Decoder
from octavo.engine.runner import model_runner
from octavo.engine.runner.input_batch import InputBatch
from octavo.engine.runner.model_runner import ModelRunner
from octavo.engine.runner.sampler import SampledTokens
from octavo.engine.runner.staging import HostCopy
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.step import ModelOutput, SchedulerOutput
from octavo.kernels import dispatch, use_backend
from octavo.kernels.sampling import LogprobOutput, SampleOutput

from ..checkpoints import make_prompts, make_tiny_llama
from ..models.teacher import load_decoder
from .by_hand import BLOCK_SIZE, GREEDY, MAX_LEN, MAX_SEQS, NullDecoder, Steps, make_runner, make_sequence, make_step

PROMPTS = make_prompts([5, 20, 1, 33, 9], seed=4)
DRAWN = SamplingParams(temperature=1.2, top_p=0.95, logprobs=2, presence_penalty=0.5, repetition_penalty=1.2)


@pytest.fixture(scope="module", autouse=True)
def _torch_backend() -> Any:
    with use_backend("torch"):
        yield


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(make_tiny_llama(tmp_path_factory.mktemp("tiny")), invariant=True)


def run(runner: ModelRunner, steps: Iterable[SchedulerOutput], *, ahead: bool) -> list[ModelOutput]:
    """Run steps, each begun before the one before it is waited for if `ahead`."""
    outputs, waiting = [], []
    for step in steps:
        waiting.append(runner.execute(step))
        if len(waiting) > ahead:
            outputs.append(waiting.pop(0).wait())
    return outputs + [handle.wait() for handle in waiting]


def told(steps: Sequence[SchedulerOutput], outputs: Sequence[ModelOutput]) -> list[Any]:
    """Return (step, row, token, log-probabilities) of all that was sampled."""
    return [
        (step.step, int(step.rows[at]), int(output.token_ids[i]), output.logprobs[i])
        for step, output in zip(steps, outputs, strict=True)
        for i, at in enumerate(step.sampled.tolist())
    ]


def mixed_steps(params: SamplingParams) -> list[SchedulerOutput]:
    """Rows come, go and are given away while steps with them are in flight; one prompt is cut in pieces."""
    plan = Steps()
    sequences = [make_sequence(row, prompt, params, seed=row) for row, prompt in enumerate(PROMPTS)]
    again = make_sequence(1, PROMPTS[3], params, seed=77)
    return [
        plan({0: 5, 1: 20}, sequences[:2]),
        plan({0: 1, 1: 1, 2: 1, 3: 17}, sequences[2:4]),
        plan({0: 1, 1: 1, 2: 1, 3: 2}),
        plan({0: 1, 1: 1, 2: 1, 3: 14}),
        plan({0: 1, 2: 1, 3: 1, 1: 16}, [again], removed=[1]),
        plan({3: 1, 0: 1, 1: 17}, removed=[2]),
        plan({0: 1, 1: 1, 3: 1, 2: 1}, [make_sequence(2, [8], params, seed=5)]),
        *(plan({0: 1, 1: 1, 2: 1, 3: 1}) for _ in range(4)),
        plan({4: 9, 0: 1, 1: 1}, sequences[4:]),
        *(plan({4: 1, 1: 1}, removed=[0] if i == 0 else []) for i in range(3)),
    ]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_two_steps_in_flight_say_what_one_says(decoder: Decoder, params: SamplingParams, graphs: bool) -> None:
    """To the last bit of the log-probabilities."""
    steps = mixed_steps(params)
    expected = told(steps, run(make_runner(decoder, invariant=True), steps, ahead=False))
    runner = make_runner(decoder, invariant=True, graphs=graphs)
    assert told(steps, run(runner, steps, ahead=True)) == expected
    assert len({token for _, _, token, _ in expected}) > 10
    if graphs:
        assert runner.graphs is not None
        assert dict(runner.graphs.counts) == {"captured": 8, "rows with more than one token": 7}


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_every_step_is_one_copy(decoder: Decoder, graphs: bool) -> None:
    steps = mixed_steps(GREEDY)
    runner = make_runner(decoder, invariant=True, graphs=graphs)
    if runner.graphs is not None:
        runner.graphs.capture_all()
    staging = runner._batch.staging
    before = staging.num_copies
    run(runner, steps, ahead=True)
    assert staging.num_copies - before == len(steps)


def broken_note(self: InputBatch, rows: Any, positions: Any, owners: Any, token_ids: Any) -> None:
    self.token_ids[rows, positions] = token_ids


def broken_feed(self: InputBatch, step: Any, *rest: Any) -> Any:
    self.last_token_ids.copy_(self.last_token_ids.roll(1))
    return REAL_UPLOAD(self, step, *rest)


REAL_UPLOAD = InputBatch.upload


@pytest.mark.parametrize(("name", "broken"), [("note", broken_note), ("upload", broken_feed)])
def test_negative_controls(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any) -> None:
    """A token is taken in for a row's next owner; a token is fed from the neighbour's row."""
    steps = mixed_steps(GREEDY)
    expected = told(steps, run(make_runner(decoder, invariant=True), steps, ahead=False))
    monkeypatch.setattr(InputBatch, name, broken)
    assert told(steps, run(make_runner(decoder, invariant=True), steps, ahead=True)) != expected


class StubSampler:
    """Notes what it is asked, and waits for the host where it is told to."""

    num_valid_ids = None

    def __init__(self, log: list[Any], waiting_rows: frozenset[int]) -> None:
        self._log, self._waiting_rows = log, waiting_rows
        self.fails: type[BaseException] | None = None

    def add(self, row: int, *_: Any, **__: Any) -> None:
        self._log.append(("add", row))

    def remove(self, row: int) -> None:
        self._log.append(("remove", row))

    def prepare(self, rows: np.ndarray, positions: np.ndarray) -> None:
        pass

    def needs_host(self, rows: np.ndarray) -> bool:
        return not self._waiting_rows.isdisjoint(rows.tolist())

    def launch(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> Any:
        self._log.append(("launch", positions.tolist()))
        if self.fails is not None:
            fails, self.fails = self.fails, None
            raise fails("told to")
        token_ids = torch.from_numpy(positions.astype(np.int32))

        def wait() -> SampledTokens:
            self._log.append(("draw", positions.tolist()))
            return SampledTokens(token_ids.numpy(), None, {}, None, {})

        return SimpleNamespace(token_ids=token_ids, wait=wait)


def stubbed(waiting_rows: Iterable[int] = ()) -> tuple[ModelRunner, list[Any], StubSampler]:
    model = NullDecoder()
    sampler = StubSampler(model.calls, frozenset(waiting_rows))
    limits = {"max_num_seqs": MAX_SEQS, "max_model_len": MAX_LEN, "block_size": BLOCK_SIZE}
    runner = ModelRunner(cast(Decoder, model), [], cast(Any, sampler), **limits)
    return runner, model.calls, sampler


def decode_steps(num_steps: int, row: int = 3) -> list[SchedulerOutput]:
    plan = Steps()
    return [plan({row: 1}, [make_sequence(row, [7])] if i == 0 else []) for i in range(num_steps)]


def test_sampling_is_launched_at_once_where_nothing_is_waited_for() -> None:
    runner, log, _ = stubbed()
    run(runner, decode_steps(3), ahead=True)
    draws = [("draw", [1]), ("draw", [2]), ("draw", [3])]
    begun = ["forward", ("launch", [2]), draws[0], "forward", ("launch", [3]), *draws[1:]]
    assert log == [("add", 3), "forward", ("launch", [1]), *begun]


def test_sampling_that_needs_the_host_comes_after_the_step_before_and_before_the_next() -> None:
    """The model runs at once. The last of three is launched by its own `wait`."""
    runner, log, _ = stubbed({3})
    run(runner, decode_steps(3), ahead=True)
    assert log == [
        ("add", 3), "forward", ("launch", [1]),  # nothing was in flight
        "forward", ("draw", [1]),
        ("launch", [2]), "forward", ("draw", [2]),
        ("launch", [3]), ("draw", [3]),
    ]  # fmt: skip


def test_without_steps_in_flight_nothing_is_deferred() -> None:
    runner, log, _ = stubbed({3})
    run(runner, decode_steps(2), ahead=False)
    step = [("launch", [2]), ("draw", [2])]
    assert log == [("add", 3), "forward", ("launch", [1]), ("draw", [1]), "forward", *step]


def test_a_deferred_sampling_still_has_the_rows_that_the_next_step_takes() -> None:
    runner, log, _ = stubbed({3})
    steps = decode_steps(2)
    first, second = (runner.execute(step) for step in steps)
    first.wait()
    runner.execute(make_step([3], [0], [1], (make_sequence(3, [9]),), ((3, 0, 1),), removed=[3], sampled=[0]))
    assert log.index(("launch", [2])) < log.index(("remove", 3))
    assert second.wait().token_ids.tolist() == [2]
    assert runner._batch.token_ids[3, :2].tolist() == [9, -1]


@pytest.mark.parametrize("deferred", [False, True])
def test_an_error_belongs_to_the_step_whose_sampling_it_is(deferred: bool) -> None:
    runner, _, sampler = stubbed({3} if deferred else ())
    first = runner.execute((steps := decode_steps(3))[0])
    sampler.fails = ValueError
    second = runner.execute(steps[1])
    assert first.wait().token_ids.tolist() == [1]
    third = runner.execute(steps[2])
    with pytest.raises(ValueError, match="told to"):
        second.wait()
    assert third.wait().token_ids.tolist() == [3]


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_a_step_that_fails_takes_no_others_along(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A row that looks back is in a step that fails, and in the next one, which is out and in which another is new."""
    looking_back = SamplingParams(temperature=0, logprobs=2, bad_words_token_ids=[[1, 2]])
    plan = Steps()
    steps = [
        plan({0: 3}, [make_sequence(0, [1, 2, 3], looking_back)]),
        plan({0: 1}),
        plan({0: 1, 1: 20}, [make_sequence(1, PROMPTS[1], GREEDY)]),
    ]
    alone = make_runner(decoder, invariant=True).execute(Steps()({1: 20}, steps[2].new_sequences)).wait()
    runner = make_runner(decoder, invariant=True)
    runner.execute(steps[0]).wait()

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("told to")

    with dispatch.override("sample", fails) if where == "launch" else nullcontext():
        second = runner.execute(steps[1])
    third = runner.execute(steps[2])
    with monkeypatch.context() as patch:
        if where == "wait":
            patch.setattr(HostCopy, "wait", fails)
        with pytest.raises(torch.OutOfMemoryError, match="told to"):
            second.wait()
    output = third.wait()
    at = steps[2].rows[steps[2].sampled].tolist().index(1)
    assert (output.token_ids[at], output.logprobs[at]) == (alone.token_ids[0], alone.logprobs[0])


def test_an_interrupt_is_not_kept_for_later() -> None:
    runner, _, sampler = stubbed()
    sampler.fails = KeyboardInterrupt
    steps = decode_steps(2)
    with pytest.raises(KeyboardInterrupt):
        runner.execute(steps[0])
    assert runner.execute(steps[1]).wait().token_ids.tolist() == [2]


def test_nothing_is_read_back_before_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that cannot be read: a step that asked it for anything would fail."""
    model = NullDecoder("meta")
    runner = make_runner(cast(Decoder, model))
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, seed=4),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.4, logprobs=2),
        SamplingParams(logit_bias={3: 1.0}, allowed_token_ids=[3, 4, 5], bad_words_token_ids=[[4]]),
        SamplingParams(return_hidden_states=[0, 2]),
        SamplingParams(min_tokens=5, stop_token_ids=[7]),
    ]

    def nothing(logits: torch.Tensor, _params: Any, *, out: SampleOutput | None = None) -> SampleOutput:
        empty = torch.empty(len(logits), dtype=torch.int64, device="meta")
        return out or SampleOutput(empty, empty.bool())

    def no_logprobs(logits: torch.Tensor, num_top: int, _token_ids: Any) -> LogprobOutput:
        top, one = (torch.empty((len(logits), *width), device="meta") for width in ((num_top,), ()))
        return LogprobOutput(top, top.long(), one, one.long())

    plan = Steps()
    sequences = [make_sequence(row, [1, 2, 3], each) for row, each in enumerate(params)]
    with ExitStack() as stack:  # the torch backend's own ops do ask
        no_ops = {"sample": nothing, "log_softmax_top": no_logprobs, "plan_paged_attention": lambda *_, **__: None}
        for op, no_op in no_ops.items():
            stack.enter_context(dispatch.override(op, no_op))
        handles = [runner.execute(plan(dict.fromkeys(range(6), 3), sequences))]
        handles += [runner.execute(plan(dict.fromkeys(range(6), 1))) for _ in range(3)]
    assert [handle._error for handle in handles] == [None] * 4  # what `wait` would raise of the sampling
    assert len(model.calls) == 4
    monkeypatch.setattr(
        model_runner, "build_attention_metadata", lambda _, inputs, *__, **___: inputs.seq_lens[0].item()
    )
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # the negative control
        runner.execute(plan(dict.fromkeys(range(6), 1)))


def test_a_step_that_samples_nothing(tmp_path: Path) -> None:
    runner, _, _ = stubbed()
    output = runner.execute(make_step([3], [0], [2], (make_sequence(3, [7, 8, 9]),), ((3, 0, 1),))).wait()
    assert output.token_ids.tolist() == []
    assert output.failed is None
