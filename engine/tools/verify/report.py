"""This module holds what a verification has found, and what counts as a divergence. It does not know how it is run or
shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from .comparison import CLEAR_GAP, LogitDifferences
from .judge import OpRecord

__all__ = [
    "ConditionResult",
    "Detector",
    "Finding",
    "Report",
    "layer_limits",
    "logits_fault",
    "perplexity",
    "report_record",
]

Detector = Literal["weights", "metadata", "op", "layer", "logits"]
ORDER: Final[dict[Detector, int]] = {"weights": 0, "metadata": 1, "op": 2, "layer": 3, "logits": 4}
"""Within a step: causes before effects."""
MAX_DIFF: Final = 1e-4
"""float32 logits: of the standard deviation of a position's logits."""
EAGER_FACTOR: Final = 4.0
"""float32: a difference may be so many times the largest that eager shows in the same dtype."""
MEAN_KL_FACTOR, TAIL_KL_FACTOR, TAIL = 1.2, 1.5, 0.99
"""Narrower dtypes: mean and tail of the KL divergence against those of eager in the same dtype."""
TOP_SHARE, TOP_SIGMAS = 0.002, 3.0
"""Narrower dtypes: part of the positions that may lose the likeliest token beyond those that eager loses, and beyond
what two runs whose rounding is equally coarse differ by: both counts are random, and small for a few hundred."""
KL_NOISE: Final = 1e-6
"""Nats; below this a ratio means nothing."""
QUANTISED_KL: Final[Mapping[str, float]] = {"int8": 0.01, "fp8": 0.05}
"""Nats, in the mean: what keys and values stored so may make of the logits, beyond rounding."""
LAYER_FACTOR, NARROW_LAYER_FACTOR = 10.0, 4.0
"""Of a hidden state against eager's largest. Measured on SmolLM2: 3.4 in float32, where one channel grows a hundredfold
within a layer and takes its rounding along, and 2.0 in bfloat16; on tiny models 1.4 in narrower dtypes."""
LAYER_FLOOR: Final = {torch.float32: 16.0, torch.float64: 128.0}
NARROW_LAYER_FLOOR: Final = 2.0
LAYER_UNITS_ALONE: Final = 2048.0
"""Of a hidden state, in units of roundoff, where there is no eager run to measure by: about 1e-4 in float32."""
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Finding:
    """A divergence."""

    detector: Detector
    condition: str
    """"" where it is the same under all."""
    step: int
    layer: int | None
    """From 0; None: before or after the layers."""
    op: str
    text: str
    position: int | None
    error_units: float | None
    """In units of roundoff of the engine's dtype, relative to the largest number of the row."""
    eager_units: float | None
    """The same of eager in the same dtype."""
    margin: float | None
    """Between the reference's two likeliest tokens at this position, as logits."""
    message: str = ""

    @property
    def place(self) -> str:
        """Layer and op in words."""
        return self.op if self.layer is None else f"layer {self.layer}, {self.op}"


@dataclass(frozen=True, slots=True)
class ConditionResult:
    """What one condition has shown. P positions were compared, in the order in which they were run."""

    name: str
    meaning: str
    num_steps: int
    num_tokens: int
    """Run, those computed again included."""
    num_preemptions: int
    num_cached_tokens: int
    num_replayed_steps: int
    texts: npt.NDArray[np.integer[Any]]
    positions: npt.NDArray[np.integer[Any]]
    """[P] each."""
    logits: LogitDifferences
    state_units: FloatArray
    """[num_states] the worst row of each hidden state, in units of roundoff."""
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """A verification."""

    model: str
    reference: str
    against: str
    device: str
    dtype: str
    kv_cache_dtype: str
    backend: str
    invariant: bool
    seconds: float
    texts: tuple[tuple[str, int], ...]
    """Name and number of tokens."""
    shared: Mapping[str, str]
    """Op -> why nothing is said of it: both sides have it in common."""
    same_replay: bool
    """Whether norms and cache writes are replayed by the very code that they run."""
    eager: LogitDifferences | None
    """Of all positions of all texts, in their order; None: the reference runs in the engine's dtype itself."""
    eager_state_units: FloatArray | None
    state_limits: FloatArray
    state_names: Sequence[str]
    """[num_states] each."""
    ops: Mapping[str, OpRecord]
    conditions: tuple[ConditionResult, ...]
    weights: tuple[Finding, ...]
    num_weights: int | None
    """Parameters compared bit by bit; None: they come from the same loader."""

    @property
    def findings(self) -> list[Finding]:
        """All divergences, the first of the cause first."""
        return [*self.weights, *(each for condition in self.conditions for each in condition.findings)]

    @property
    def first(self) -> Finding | None:
        """The first divergence; None: there is none."""
        return next(iter(self.findings), None)

    @property
    def passed(self) -> bool:
        """Whether nothing diverges."""
        return self.first is None

    def repeat(self, finding: Finding) -> list[str]:
        """Return the flags that repeat just what a finding is about."""
        flags = []
        if finding.condition:
            flags += ["--condition", finding.condition]
        if finding.text and finding.position is not None:
            flags += ["--text", finding.text, "--position", str(finding.position)]
        return flags


def perplexity(nll: FloatArray) -> float:
    """Return exp of the mean, over the positions that something follows; NaN where there is none."""
    known = nll[~np.isnan(nll)]
    return float(np.exp(known.mean())) if len(known) else float("nan")


def layer_limits(eager_units: FloatArray | None, num_states: int, dtype: torch.dtype) -> FloatArray:
    """Return what each hidden state may differ by, in units of roundoff.

    Args:
        eager_units: [num_states] the largest that eager in the same dtype shows; None: unknown.
        num_states: the embedding, each layer, the final norm.
        dtype: the engine's.
    """
    factor = LAYER_FACTOR if dtype in LAYER_FLOOR else NARROW_LAYER_FACTOR
    if eager_units is None:
        limits = np.full(num_states, LAYER_UNITS_ALONE)
    else:
        limits = np.maximum(factor * eager_units, LAYER_FLOOR.get(dtype, NARROW_LAYER_FLOOR))
    limits[0] = 1.0 if eager_units is None else max(1.0, factor * eager_units[0])
    return limits


def logits_fault(
    found: LogitDifferences, eager: LogitDifferences | None, dtype: torch.dtype, max_mean_kl: float | None = None
) -> tuple[int, str] | None:
    """Return the index of the first position whose logits are wrong and why; None: all are right.

    float32 is held to bounds at every position; narrower dtypes, whose differences are noise one by one, as a whole.
    With a `max_mean_kl`, only their mean KL is held to that, on top of eager's.
    """
    if not len(found):
        return None
    if max_mean_kl is not None:
        return _mean_fault(found, max_mean_kl + (0.0 if eager is None else MEAN_KL_FACTOR * float(eager.kl.mean())))
    if dtype in (torch.float32, torch.float64):
        largest = 0.0 if eager is None else EAGER_FACTOR * float(eager.max_diff.max())
        limits = np.maximum(MAX_DIFF * found.spread, largest)
        lost = (found.same_top == 0) & (found.margin > CLEAR_GAP)
        wrong = np.flatnonzero(~(found.max_diff <= limits) | lost)
        if not len(wrong):
            return None
        at = int(wrong[0])
        what = "the likeliest token is another" if lost[at] else "the logits differ"
        return at, f"{what}: by {found.max_diff[at]:.3g} at most, allowed {limits[at]:.3g}"
    return _narrow_fault(found, eager)


def _mean_fault(found: LogitDifferences, limit: float) -> tuple[int, str] | None:
    mean = float(found.kl.mean())
    if mean <= limit:
        return None
    return int(np.nan_to_num(found.kl, nan=np.inf).argmax()), f"the mean KL is {mean:.3g} nats, allowed {limit:.3g}"


def _narrow_fault(found: LogitDifferences, eager: LogitDifferences | None) -> tuple[int, str] | None:
    at = int(np.nan_to_num(found.kl, nan=np.inf).argmax())
    if not np.isfinite(found.kl).all():
        return at, "the logits are not finite"
    if eager is None:
        return None
    mean, tail = float(found.kl.mean()), float(np.quantile(found.kl, TAIL))
    eager_mean, eager_tail = float(eager.kl.mean()), float(np.quantile(eager.kl, TAIL))
    if mean > MEAN_KL_FACTOR * eager_mean + KL_NOISE:
        return at, f"the mean KL is {mean:.3g} nats, and eager's {eager_mean:.3g} (allowed: {MEAN_KL_FACTOR} times)"
    if tail > TAIL_KL_FACTOR * eager_tail + KL_NOISE:
        return at, f"p99 of the KL is {tail:.3g} nats, and eager's {eager_tail:.3g} (allowed: {TAIL_KL_FACTOR} times)"
    clear = max(CLEAR_GAP, EAGER_FACTOR * float(eager.max_diff.max()))
    wrong = np.flatnonzero((found.same_top == 0) & (found.margin > clear))
    if len(wrong):
        return int(wrong[0]), f"the likeliest token is another, and leads by more than {clear:.3g} in the reference"
    lost, of_eager = (int(((each.same_top == 0) & (each.margin > CLEAR_GAP)).sum()) for each in (found, eager))
    times = len(found) / len(eager)  # above 1 where positions are run again, all at once right or wrong
    noise = TOP_SIGMAS * float(np.sqrt(2 * max(times * of_eager, 1.0) * max(times, 1.0)))
    if lost > times * of_eager + max(1.0, TOP_SHARE * len(found)) + noise:
        return at, f"the likeliest token is another at {lost} of {len(found)} positions, eager's at {of_eager}"
    return None


def report_record(report: Report) -> dict[str, Any]:
    """Return everything as plain values for JSON; numbers that are not finite become null."""
    record = {
        "octavo": "verify",
        "passed": report.passed,
        **{name: getattr(report, name) for name in ("model", "reference", "against", "device", "dtype", "backend")},
        "kv_cache_dtype": report.kv_cache_dtype,
        "invariant": report.invariant,
        "seconds": round(report.seconds, 3),
        "texts": [{"name": name, "num_tokens": number} for name, number in report.texts],
        "not_independent": dict(report.shared),
        "same_replay": report.same_replay,
        "num_weights": report.num_weights,
        "findings": [asdict(each) | {"repeat": report.repeat(each)} for each in report.findings],
        "ops": {name: asdict(each) for name, each in report.ops.items()},
        "states": {
            "names": list(report.state_names),
            "eager_units": _plain(report.eager_state_units),
            "limit_units": _plain(report.state_limits),
        },
        "eager": None if report.eager is None else _logits(report.eager),
        "conditions": [_condition(each) for each in report.conditions],
    }
    return {name: _plain(value) for name, value in record.items()}


def _condition(result: ConditionResult) -> dict[str, Any]:
    counts = ("num_steps", "num_tokens", "num_preemptions", "num_cached_tokens", "num_replayed_steps")
    return {
        "name": result.name,
        "meaning": result.meaning,
        **{name: getattr(result, name) for name in counts},
        "state_units": result.state_units,
        "text": result.texts,
        "position": result.positions,
        **_logits(result.logits),
    }


def _logits(found: LogitDifferences) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    if len(found):
        summary = {
            "max_diff": found.max_diff.max(),
            "mean_diff": found.mean_diff.mean(),
            "mean_kl": found.kl.mean(),
            "p99_kl": np.quantile(found.kl, TAIL),
            "top1_agreement": found.same_top.mean(),
            "perplexity": perplexity(found.nll),
            "perplexity_reference": perplexity(found.nll_reference),
        }
    return {"summary": summary, "by_position": asdict(found)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
