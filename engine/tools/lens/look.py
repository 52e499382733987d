"""This module holds `look`: one run of an engine under watch, read layer by layer. It does not know files or pages."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from octavo import kernels
from octavo.kernels.dispatch import TRITON_BLOCK_SIZES, Backend

from ...errors import ConfigError, RequestError
from ...intake import DEFAULT_MAX_TOKENS
from ...llm import LLM, GenerationProgress, Prompt
from ...runner.model_runner import ModelRunner
from ...sampling_params import SamplingParams
from ...step import CompletionOutput
from .readings import Ids, Readings, differences, read_states
from .watch import Watch, watching

__all__ = ["DEFAULT_LAST", "DEFAULT_TOP", "Lens", "PathView", "look"]

DEFAULT_TOP, MAX_TOP = 5, 50
DEFAULT_LAST = 64
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
"""Whatever sampling defaults the model came with."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class PathView:
    """What one backend's run showed."""

    backend: Backend
    states: torch.Tensor
    """[num_layers + 2, P, H] float32: 0 is the embedding, i what layer i leaves, the last two after and before the
    final norm."""
    readings: Readings

    @property
    def hidden_states(self) -> torch.Tensor:
        """[num_layers + 1, P, H], what transformers calls `output_hidden_states`: the last one is after the norm."""
        return self.states[:-1]


@dataclass(frozen=True, slots=True)
class Lens:
    """One text and what every layer made of each of its positions: P positions, R layers."""

    llm: LLM
    token_ids: list[int]
    """Prompt and output."""
    num_prompt_tokens: int
    first_position: int
    """The first of the P. The last token of the output is not among them: nothing has read it."""
    layers: tuple[int, ...]
    """The R that were read, in `hidden_states`' numbering, ascending; the last layer always."""
    answer_ids: Ids
    """[P] the token that was generated there; inside the prompt, which goes on by itself, what the last layer says."""
    paths: tuple[PathView, ...]
    """One for each backend; the second ran the first one's tokens."""
    differences: npt.NDArray[np.float64] | None
    """[R, P] of the two paths' hidden states, |a - b| / |a|; None: there is one path."""
    why_alone: str
    """Why there is no second path; "" where there is."""
    output: CompletionOutput

    @property
    def settled(self) -> Ids:
        """[P] the first of the R layers from which on the answer is the likeliest token; -1: not even in the last."""
        says = self.paths[0].readings.top_ids[:, :, 0] == self.answer_ids
        from_here_on = np.logical_and.accumulate(says[::-1])[::-1]
        return np.where(from_here_on[-1], np.array(self.layers)[from_here_on.argmax(axis=0)], -1)


def look(
    llm: LLM,
    prompt: Prompt | Sequence[Mapping[str, str]],
    params: SamplingParams = GREEDY,
    *,
    layers: Sequence[int] | None = None,
    top: int = DEFAULT_TOP,
    last: int = DEFAULT_LAST,
    both: bool | None = None,
    on_progress: Progress | None = None,
) -> Lens:
    """Generate under watch, and read each position's hidden state after each layer.

    Args:
        llm: an engine that has nothing else to do; its own chunks and steps are what is seen.
        prompt: a text, its token ids, or the messages of a conversation.
        params: how to generate; `n` must be 1, and `cache_salt` does not count. `max_tokens` defaults to 16.
        layers: which to read, 0 being the embedding; None: all. The last one is read in any case.
        top: candidates to keep.
        last: positions to look at, counted from the end of the prompt; those of the output come on top.
        both: run the text on the other backend, too; None: where both run at full speed, which takes a GPU.
        on_progress: called with (what is done now, how far, of how much).

    Raises:
        RequestError: the prompt or a parameter is not allowed.
        ConfigError: layers, top, last or both cannot be had.
    """
    if params.n != 1:
        raise RequestError(f"n is {params.n}; allowed: 1, as a lens shows one text", "n")
    for name, value, limit in (("top", top, MAX_TOP), ("last", last, 2**31 - 1)):
        if not 1 <= value <= limit:
            raise ConfigError(f"{name} is {value}; allowed: 1 to {limit}")
    if llm.stats.num_running or llm.stats.num_waiting:
        raise ConfigError("the engine has other requests; allowed: one that has nothing else to do")
    run = _Looking(llm, _checked_layers(llm, layers), top, on_progress or (lambda _what, _done, _total: None))
    other, why_alone = _other_backend(llm, both)
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    prompt_ids = llm.chat_template.encode(prompt) if is_chat else llm.encode(prompt)  # type: ignore[arg-type]
    first = max(0, len(prompt_ids) - last)

    with kernels.use_backend(own := llm.engine.resolved.backend):
        output, watch = run.generate(prompt_ids, params, first)
        text = prompt_ids + output.token_ids
        # Where steps overlap, the last token may have been run before it was known to be the last.
        stop = min(watch.num_positions, max(len(prompt_ids), len(text) - 1))
        next_ids = np.array([*text[first + 1 : stop + 1], -1][: stop - first], dtype=np.int64)
        is_output = np.arange(first, stop) >= len(prompt_ids) - 1
        views, answer_ids = run.read(watch, stop, next_ids, np.where(is_output, next_ids, -1))
        paths = [PathView(own, *views)]
    if other is not None:
        forced = GREEDY.replace(ignore_eos=True, max_tokens=stop + 1 - len(prompt_ids))
        with kernels.use_backend(other):
            _, watch = run.generate(prompt_ids, forced, first, [*text, 0])
            paths.append(PathView(other, *run.read(watch, stop, next_ids, answer_ids)[0]))
    return Lens(
        llm=llm,
        token_ids=text,
        num_prompt_tokens=len(prompt_ids),
        first_position=first,
        layers=run.layers,
        answer_ids=answer_ids,
        paths=tuple(paths),
        differences=None if other is None else differences(*(path.states[run.raw_layers] for path in paths)),
        why_alone=why_alone,
        output=output,
    )


class _Looking:
    """One call of `look`: runs the engine and reads what passes, on the backend in force."""

    def __init__(self, llm: LLM, layers: tuple[int, ...], top: int, tell: Progress) -> None:
        self.layers = layers
        self._llm = llm
        runner = llm.engine.core.runner
        assert isinstance(runner, ModelRunner), "a lens needs a model"
        self._runner = runner
        self._top = top
        self._tell = tell
        self._num_layers = llm.engine.model_config.num_layers

    @property
    def raw_layers(self) -> list[int]:
        """Where the layers are in `PathView.states`, the last one before the norm."""
        return [layer + (layer == self._num_layers) for layer in self.layers]

    def generate(
        self, prompt_ids: list[int], params: SamplingParams, first: int, text: Sequence[int] | None = None
    ) -> tuple[CompletionOutput, Watch]:
        """Run the engine under a watch; see `watching`."""
        backend = kernels.current_backend()
        # Blocks that an earlier request left in the cache would not be run again, and not be seen.
        params = params.replace(cache_salt=secrets.token_hex(8))

        def on_progress(progress: GenerationProgress) -> None:
            done, total = progress.num_output_tokens, params.max_tokens or DEFAULT_MAX_TOKENS
            self._tell(f"run on {backend}", progress.num_prefill_tokens + done, len(prompt_ids) + total)

        with watching(self._runner, first=first, text=text) as watch:
            answers = self._llm.generate([prompt_ids], params, on_progress=on_progress)
        return answers[0].outputs[0], watch

    def read(
        self, watch: Watch, stop: int, next_ids: Ids, answer_ids: Ids
    ) -> tuple[tuple[torch.Tensor, Readings], Ids]:
        """Read what a watch has kept up to a position; return it, the readings, and the answers."""
        tokenizer, vocab_size = self._llm.engine.tokenizer, self._llm.engine.model_config.vocab_size
        backend, states = kernels.current_backend(), watch.states(stop)
        readings, answer_ids = read_states(
            self._runner.model,
            states,
            self.layers,
            next_ids=next_ids,
            answer_ids=answer_ids,
            logits_at=watch.drawn_from,
            num_ids=vocab_size if tokenizer is None else min(tokenizer.vocab_size, vocab_size),
            top=self._top,
            on_progress=lambda done, total: self._tell(f"read {backend}'s layers", done, total),
        )
        return (states, readings), answer_ids


def _checked_layers(llm: LLM, layers: Sequence[int] | None) -> tuple[int, ...]:
    num_layers = llm.engine.model_config.num_layers
    for layer in layers or ():
        if not 0 <= layer <= num_layers:
            raise ConfigError(f"layer {layer} is not there; allowed: 0 (the embedding) to {num_layers}")
    return tuple(sorted({*(range(num_layers) if layers is None else layers), num_layers}))


def _other_backend(llm: LLM, both: bool | None) -> tuple[Backend | None, str]:
    """Return the backend to run as well, or None and why there is none.

    Raises:
        ConfigError: it was asked for and cannot run.
    """
    resolved = llm.engine.resolved
    other: Backend = "torch" if resolved.backend == "triton" else "triton"
    if both is False:
        return None, "one path was asked for"
    reason = ""
    if other not in kernels.available_backends():
        reason = "the Triton kernels need a GPU, or their interpreter (TRITON_INTERPRET=1)"
    elif other == "triton" and resolved.device == "cpu" and not kernels.interpreted():
        reason = "the Triton kernels cannot run on the CPU of a machine with a GPU"
    elif other == "triton" and resolved.block_size not in TRITON_BLOCK_SIZES:
        allowed = ", ".join(map(str, TRITON_BLOCK_SIZES))
        reason = f"the Triton kernels take blocks of {allowed} tokens, not of {resolved.block_size}"
    elif both is None and kernels.interpreted():
        reason = "Triton's interpreter is slow; --both runs it all the same"
    if reason and both:
        raise ConfigError(f"both paths cannot be run: {reason}")
    return (None, reason) if reason else (other, "")
