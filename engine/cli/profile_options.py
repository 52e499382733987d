"""This module holds the flags of `octavo profile`, checked. It does not know what is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, describe
from .outputs import check_output

__all__ = ["KernelOptions", "StepOptions", "integers", "split_words"]


def _check_outputs(html: Path | None, json: Path | None, rounds: int) -> None:
    check_output("--html", html)
    check_output("--json", json)
    if not 1 <= rounds < 1000:
        raise ConfigError(f"--rounds is {describe(rounds)}; allowed: an integer from 1 to 999")


def integers(flag: str, text: str) -> list[int]:
    """Return the integers of a flag with commas between.

    Raises:
        ConfigError: one is none, or below 1.
    """
    words = text.split(",")
    if not all(word.isdecimal() and 0 < int(word) < 2**31 for word in words):
        raise ConfigError(f"{flag} is {describe(text)}; allowed: integers above 0, several with commas between")
    return [int(word) for word in words]


def split_words(words: Sequence[str] | None, history: Sequence[str] | None) -> tuple[str | None, list[Path]]:
    """Return the model and the earlier runs: what follows the first value of --history arrives as an argument.

    Of files that end in .json only a config.json is then taken for a model.

    Raises:
        ConfigError: there are two models.
    """
    rest = [
        word for word in words or () if not history or Path(word).suffix != ".json" or Path(word).name == "config.json"
    ]
    if len(rest) > 1:
        raise ConfigError(f"two models are named: {describe(rest[0])} and {describe(rest[1])}; allowed: one")
    more = [word for word in words or () if word not in rest]
    return rest[0] if rest else None, [Path(word) for word in (*(history or ()), *more)]


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What to look at, and where to put what is found.

    Raises:
        ConfigError: a value is not allowed.
    """

    geometry: str | None = None
    """Sizes by name: llama-3-8b, mistral-7b, qwen3-8b, qwen3-0.6b, smollm2-135m, gpt2; or field=value,... to change
    some. Not given: llama-3-8b, or those of MODEL."""
    target: str | None = None
    """Of sm_80, sm_89, sm_90, sm_100, sm_120, several with commas. Not given: the GPU's here, or sm_90."""
    only: str | None = None
    """Only ops or kernels whose names contain this, or one of these with commas."""
    block_size: str = "64,16"
    """Tokens per block, several with commas; calls have the first."""
    kv_cache: Literal["auto", "int8", "e4m3"] = "auto"
    """How the calls' KV cache is stored."""
    compile: bool = True
    """Compile the kernels and read their machine code; a first time takes minutes."""
    time: bool | None = None
    """Time the calls: on a GPU the kernels, on a CPU the torch backend at small sizes. Not given: on a GPU."""
    rounds: int = 7
    """Times that every call is timed, in turns."""
    html: Path | None = None
    """Write a page there."""
    json: Path | None = None
    """Write everything there, - for stdout; a later run takes it with --history."""
    history: list[str] | None = None
    """JSON of earlier runs, the oldest first: shows the trend, marks what is worse, and exits with 1 if anything is."""
    cache: Path | None = None
    """Folder in which what was compiled is remembered; not given: the user's cache."""
    workers: int = 2
    """Processes that compile."""

    def __post_init__(self) -> None:
        _check_outputs(self.html, self.json, self.rounds)
        if not 1 <= self.workers <= 256:
            raise ConfigError(f"--workers is {describe(self.workers)}; allowed: an integer from 1 to 256")
        if self.kv_cache not in ("auto", "int8", "e4m3"):
            raise ConfigError(f"--kv-cache is {describe(self.kv_cache)}; allowed: auto, int8, e4m3")


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What the engine is given to do, and where to put what is found.

    Raises:
        ConfigError: a value is not allowed.
    """

    batch_size: str = "1,8"
    """Requests that run together, several with commas: a batch each, one after the other."""
    input_len: int = 128
    """Tokens of a prompt, drawn at random."""
    output_len: int = 32
    """Tokens of an answer."""
    rounds: int = 5
    """Times that all batches are run."""
    trace: Path | None = None
    """Write a Chrome trace of one more round there, by torch.profiler; for Perfetto or chrome://tracing."""
    proton: Path | None = None
    """On a GPU: write Triton's own profile of one more round there, for proton-viewer."""
    html: Path | None = None
    """Write a page there."""
    json: Path | None = None
    """Write everything there, - for stdout; a later run takes it with --history."""
    history: list[str] | None = None
    """JSON of earlier runs, the oldest first: shows the trend, marks what is worse, and exits with 1 if anything is."""

    def __post_init__(self) -> None:
        _check_outputs(self.html, self.json, self.rounds)
        for name in ("input_len", "output_len"):
            if not 1 <= getattr(self, name) < 2**20:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} is {describe(getattr(self, name))}; allowed: an integer from 1 to 2**20 - 1")
