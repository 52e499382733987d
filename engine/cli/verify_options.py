"""This module holds the flags of `octavo verify` besides the engine's settings, checked. It does not know what is
verified.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, describe
from .outputs import check_output

__all__ = ["VerifyOptions"]

AGAINST = ("hf", "torch")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What to compare with what.

    Raises:
        ConfigError: a value is not allowed.
    """

    against: Literal["hf", "torch"] = "hf"
    """The reference: transformers, or octavo's own torch backend."""
    prompts: Path | None = None
    """Texts to run: a .txt file with one per line, or JSONL with prompt, prompt_token_ids or messages, and maybe id.
    Not given: fourteen short ones, of several languages and code."""
    html: Path | None = None
    """Write the page there."""
    json: Path | None = None
    """Write everything there, each position by itself; - is stdout, and then the only thing there."""
    condition: str | None = None
    """Run under this condition only: alone, batched, decoding, chunked, preempted, or 'prefix hits'."""
    text: str | None = None
    """Compare this text only, by its name; the others run beside it all the same, so that steps stay what they are."""
    position: int | None = None
    """With a text: replay every op of every step up to the one that computes this position, and stop there."""
    every_step: bool = False
    """Replay the ops of all steps in float64, not of the first of each kind: takes several times as long."""

    def __post_init__(self) -> None:
        if self.against not in AGAINST:
            raise ConfigError(f"--against is {describe(self.against)}; allowed: {', '.join(AGAINST)}")
        for name, file in (("html", self.html), ("json", self.json)):
            check_output(f"--{name}", file)
