"""This module holds the verification: a reference asked, weights compared, every condition run. It does not know argv
or pages.

The detectors look at every step, but for the op detector: replaying each op of each step in float64 would take several
times as long as all else, so it replays the first step of every kind. Where hidden states or logits diverge and no op
was seen to be wrong by then, the condition is run once more and every op replayed until one is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ...errors import ConfigError
from ...hardware import detect
from ...loader import resolve_model
from ...loader.bundled import BUNDLED, bundled_path
from ...runner.model_runner import ModelRunner
from ...startup import Engine
from .baseline import Baseline
from .conditions import Condition, make_conditions
from .forced import state_names
from .judge import OpRecord
from .ops import place_of
from .reference import Reference
from .report import ORDER, QUANTISED_KL, ConditionResult, Finding, Report
from .texts import Text, make_texts
from .torch_reference import TorchReference
from .transformers_reference import TransformersReference
from .watched_run import WatchedRun
from .weights import wrong_weights

__all__ = ["AGAINST", "Focus", "verify"]

AGAINST = ("hf", "torch")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Focus:
    """What to look at; everything runs as it does without one, so that a part diverges as it did in the whole."""

    condition: str | None = None
    text: str | None = None
    position: int | None = None
    """In that text. Every op of every step is replayed, up to the step that computes the position."""


def verify(
    engine: Engine,
    texts: Sequence[Text],
    *,
    against: str = "hf",
    cut: bool = False,
    focus: Focus | None = None,
    every_step: bool = False,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> Report:
    """Run texts through an engine and a reference, each token forced, and compare them at every position.

    Args:
        engine: its model is used, with schedulers and caches of the conditions' own.
        texts: what to feed.
        against: "hf": transformers; "torch": octavo's torch backend.
        cut: shorten texts that are longer than the engine takes.
        focus: what to look at; None: everything.
        every_step: replay the ops of all steps.
        on_progress: called with (what is done now, how far, of how much).

    Raises:
        ConfigError: a text, the focus or the reference cannot be used.
    """
    texts = make_texts(texts, engine.resolved.max_model_len, cut=cut)
    return _Verifier(engine, texts, focus or Focus(), on_progress).run(against, every_step)


class _Verifier:
    """One verification."""

    def __init__(self, engine: Engine, texts: Sequence[Text], focus: Focus, tell: Progress) -> None:
        runner = engine.core.runner
        assert isinstance(runner, ModelRunner), "there is a model to verify"
        self._engine = engine
        self._decoder, self._cache = runner.model, runner.cache
        self._texts = texts
        self._on_progress = tell
        self._done = 0
        self._records: dict[str, OpRecord] = {}
        self._watched = _watched(texts, focus)
        self._stop_at = None if focus.position is None else (self._watched[0], focus.position)
        self._conditions = make_conditions(texts, engine.resolved.block_size)
        if focus.condition is not None:
            allowed = ", ".join(each.name for each in self._conditions)
            self._conditions = [each for each in self._conditions if each.name == focus.condition]
            if not self._conditions:
                raise ConfigError(f"--condition is {focus.condition!a}; allowed: {allowed}")

    def run(self, against: str, every_step: bool) -> Report:
        """Return what was found."""
        start = time.monotonic()
        self._tell("load the reference", 0)
        self._reference = reference = self._make_reference(against)
        resolved = self._engine.resolved
        self._baseline = baseline = Baseline(
            reference,
            self._texts,
            self._watched,
            self._decoder.dtype,
            self._tell,
            QUANTISED_KL.get(resolved.kv_cache_dtype),
        )
        weights: tuple[Finding, ...] = ()
        if reference.checks_weights:
            self._tell("compare the weights", 0)
            weights = tuple(
                Finding("weights", "", 0, *place_of(wrong.name), "", None, None, None, None, wrong.message)
                for wrong in wrong_weights(self._decoder, reference.parameters)
            )
        results = tuple(self._verify(condition, every_step) for condition in self._conditions)
        return Report(
            model=self._engine.config.model,
            reference=reference.title,
            against=against,
            device=resolved.device,
            dtype=resolved.dtype,
            kv_cache_dtype=resolved.kv_cache_dtype,
            backend=resolved.backend,
            invariant=resolved.invariant,
            seconds=time.monotonic() - start,
            texts=tuple((text.name, len(text.token_ids)) for text in self._texts),
            shared=reference.shared,
            same_replay=resolved.backend == "torch",
            eager=baseline.eager,
            eager_state_units=baseline.eager_units,
            state_limits=baseline.limits,
            state_names=state_names(self._decoder.config.num_layers),
            ops=self._records,
            conditions=results,
            weights=weights,
            num_weights=sum(1 for _ in self._decoder.modules()) if reference.checks_weights else None,
        )

    def _tell(self, what: str, num_tokens: int) -> None:
        """Count tokens: of the reference in both dtypes, and of every condition's rounds."""
        self._done += num_tokens
        lengths = [len(text.token_ids) for text in self._texts]
        total = 2 * sum(lengths[i] for i in self._watched) + sum(lengths) * sum(c.rounds for c in self._conditions)
        self._on_progress(what, self._done, max(total, self._done))

    def _make_reference(self, against: str) -> Reference:
        if against not in AGAINST:
            raise ConfigError(f"--against is {against!a}; allowed: {', '.join(AGAINST)}")
        config, resolved = self._engine.config, self._engine.resolved
        dtype, device = self._decoder.dtype, self._decoder.device
        wide = torch.float32
        # Twice the bytes of the weights for a float64 copy, and as much again while it is made.
        if dtype == torch.float32 and 4 * resolved.weight_bytes < detect(config.device, config.backend).available_bytes:
            wide = torch.float64
        if against == "torch":
            return TorchReference(
                resolve_model(config.model, load_format=config.load_format, seed=config.seed),
                dtype=wide,
                engine_dtype=dtype,
                device=device,
                max_model_len=resolved.max_model_len,
                backend=resolved.backend,
            )
        if config.load_format == "dummy":
            raise ConfigError("load_format is 'dummy', and transformers has no such weights; use --against torch")
        source = bundled_path(config.model) if config.model in BUNDLED else config.model
        return TransformersReference(source, dtype=wide, engine_dtype=dtype, device=device)

    def _verify(self, condition: Condition, every_step: bool) -> ConditionResult:
        every_step = every_step or self._stop_at is not None
        result = self._watch(condition, every_step=every_step)
        first = next(iter(result.findings), None)
        if first is None or ORDER[first.detector] < ORDER["layer"] or every_step:
            return result
        assert first.position is not None, "hidden states and logits belong to positions"
        text = next(i for i, text in enumerate(self._texts) if text.name == first.text)
        again = self._watch(condition, every_step=True, until_op=True, stop_at=(text, first.position))
        causes = [each for each in again.findings if each.detector == "op"]
        if causes:
            return replace(result, findings=(*causes, *result.findings))
        why = "; every op equals its replay"
        if self._engine.resolved.backend == "torch":
            why += ", which for norms and write_kv runs the same code on the torch backend"
        return replace(result, findings=(replace(first, message=first.message + why), *result.findings[1:]))

    def _watch(
        self,
        condition: Condition,
        *,
        every_step: bool,
        until_op: bool = False,
        stop_at: tuple[int, int] | None = None,
    ) -> ConditionResult:
        what = f"{condition.name}{', every op' if every_step else ''}"
        self._tell(what, 0)
        resolved = self._engine.resolved
        return WatchedRun(
            self._decoder,
            self._texts,
            condition,
            self._baseline,
            self._reference.parameters,
            self._records,
            max_model_len=resolved.max_model_len,
            invariant=resolved.invariant,
            like=self._cache,
            stop_at=stop_at or self._stop_at,
            every_step=every_step,
            until_op=until_op,
            on_step=lambda num_tokens: self._tell(what, num_tokens),
        ).run()


def _watched(texts: Sequence[Text], focus: Focus) -> list[int]:
    """Return the indices of the texts to compare.

    Raises:
        ConfigError: the focus names none.
    """
    if focus.text is None:
        if focus.position is not None:
            raise ConfigError("--position is given without --text; allowed: both, or neither")
        return list(range(len(texts)))
    found = [i for i, text in enumerate(texts) if text.name == focus.text]
    if not found:
        raise ConfigError(f"--text is {focus.text!a}; allowed: {', '.join(text.name for text in texts)}")
    length = len(texts[found[0]].token_ids)
    if focus.position is not None and not 0 <= focus.position < length:
        raise ConfigError(f"--position is {focus.position}; allowed: 0 to {length - 1}")
    return found[:1]
