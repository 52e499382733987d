"""This module holds the numbers a scheduler works within. It does not know where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..config import FaultConfig
from ..errors import ConfigError

__all__ = ["SchedulerLimits", "SchedulerStats"]


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a scheduler may use; every "auto" is already a number.

    Raises:
        ConfigError: two of them contradict each other.
    """

    vocab_size: int
    """Width of the logits; every token id is below it."""
    max_model_len: int
    """Longest prompt plus output, tokens."""
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    """Blocks of the KV pool, without the null block."""
    block_size: int
    eos_token_ids: frozenset[int] = frozenset()
    model_id: str = ""
    """Part of every prefix's name, so that two models never share KV."""
    prefix_caching: bool = True
    policy: Literal["fcfs", "priority"] = "fcfs"
    faults: FaultConfig = field(default_factory=FaultConfig)
    max_steps_in_flight: Literal[1, 2] = 1
    """2: the next step is scheduled while the device runs one."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_blocks",
            "block_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: a positive integer")
        if not all(0 <= token_id < self.vocab_size for token_id in self.eos_token_ids):
            raise ConfigError(f"eos_token_ids are {sorted(self.eos_token_ids)}; allowed: 0 to {self.vocab_size - 1}")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs is {self.max_num_seqs}; allowed: at most max_num_batched_tokens, "
                f"{self.max_num_batched_tokens}, so that every running sequence gets a token in every step"
            )

    @property
    def num_slots(self) -> int:
        """Tokens the KV pool holds."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """What a scheduler has done and holds now."""

    num_running: int
    num_waiting: int
    """Preempted ones included."""
    num_free_blocks: int
    num_cached_blocks: int
    num_steps: int
    num_preemptions: int
    prefix_cache_queries: int
    """Tokens looked up at admissions."""
    prefix_cache_hits: int
    """Those of them that were found."""
    num_prefill_tokens: int
    """Run so far, by rows that ran more than one in their step."""
    num_output_tokens: int
    """Sampled so far, by sequences that were still there and did not fail."""
    num_wasted_tokens: int
    """Sampled in vain: the sequence had ended or been preempted while the step was out."""
