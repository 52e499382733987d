"""This module holds the conditions texts run under: batching, chunks, preemption, prefix hits. It does not know
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...config import FaultConfig
from ...scheduler import SchedulerLimits
from .texts import Text

__all__ = ["Condition", "make_conditions"]

SMALL_BLOCK = 16
CHUNK_TOKENS = 40
FEW_FORCED, MANY_FORCED = 6, 24


@dataclass(frozen=True, slots=True)
class Condition:
    """How the scheduler is made to cut up the same texts."""

    name: str
    meaning: str
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    num_forced: int
    """Tokens at each text's end that are fed as if they had been generated, one per step."""
    rounds: int = 1
    """How often all texts run; each round begins when the one before has ended."""
    prefix_caching: bool = True
    faults: FaultConfig = field(default_factory=FaultConfig)

    def limits(self, vocab_size: int, max_model_len: int) -> SchedulerLimits:
        """Return what the scheduler may use."""
        return SchedulerLimits(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            prefix_caching=self.prefix_caching,
            faults=self.faults,
        )


def make_conditions(texts: Sequence[Text], block_size: int) -> list[Condition]:
    """Return the conditions for these texts.

    Args:
        texts: what will run.
        block_size: the engine's; smaller blocks are tried besides.
    """
    lengths = [len(text.token_ids) for text in texts]
    total, longest, number = sum(lengths), max(lengths), len(texts)
    small = min(SMALL_BLOCK, block_size)

    def blocks(size: int, share: float = 1.0) -> int:
        # One token more than a text has is sampled, and may open a block.
        needed = [length // size + 1 for length in lengths]
        return max(int(share * sum(needed)), max(needed) + 1)

    chunk = max(CHUNK_TOKENS, number + 1)
    return [
        Condition(
            "alone",
            "one text at a time, its prompt in one piece",
            *(1, longest, block_size, blocks(block_size), 0),
            prefix_caching=False,
        ),
        Condition("batched", "all prompts at once", number, max(total, number), block_size, blocks(block_size), 0),
        Condition(
            "decoding",
            "most of each text token by token, all side by side",
            *(number, max(total, number), small, blocks(small), MANY_FORCED),
        ),
        Condition(
            "chunked",
            f"prompts in chunks within {chunk} tokens per step, beside texts that decode",
            *(number, chunk, small, blocks(small), FEW_FORCED),
            prefix_caching=False,
        ),
        Condition(
            "preempted",
            "too few blocks, and the youngest text preempted every fourth step; what it loses is computed again",
            *(number, max(2 * chunk, number), small, blocks(small, 0.5), FEW_FORCED),
            faults=FaultConfig(preempt_every=4, miss_prefix_cache=True),
        ),
        Condition(
            "prefix hits",
            "all texts twice, the second time from the blocks of the first; some preempted, and resumed from their own",
            *(number, max(2 * chunk, number), small, blocks(small, 2.0), FEW_FORCED),
            rounds=2,
            faults=FaultConfig(preempt_every=5),
        ),
    ]
