"""This module holds an engine that answers at once: everything is real but the model, whose place a `FakeRunner` has.
It does not know who tests with it.

It starts without torch. Its tokens are hashes of everything before them, so `reference_tokens(..., alphabet=ALPHABET)`
says what each request must get; its tokenizer makes a printable character of each.
"""

from __future__ import annotations

import time
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ..config import EngineConfig, GenerationConfig, ModelConfig
from ..core import EngineCore
from ..events import Recorder
from ..resolve import ResolvedConfig
from ..runner.fake_runner import FakeRunner
from ..scheduler import Scheduler, SchedulerLimits
from ..startup import Engine, StartupPhase
from ..text import Tokenizer

__all__ = ["ALPHABET", "FAKE_ENGINE", "fake_engine", "fake_tokenizer"]

FAKE_ENGINE = "octavo.engine.process.fake:fake_engine"
"""What to give as `engine_factory`."""
ALPHABET = 94
"""Sampled ids are below it; they are the characters "!" to "~"."""
VOCAB_SIZE = 264
_SPECIAL = ("<|im_start|>", "<|im_end|>")
_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def fake_engine(config: EngineConfig, *, recorder: Recorder | None = None, **_: Any) -> Engine:
    """Build an engine without a model, of the sizes that the settings give; called as `start_engine` is."""
    start = time.monotonic()
    block_size, scheduler = config.cache.block_size, config.scheduler
    max_model_len = scheduler.max_model_len or 2048
    num_blocks = (config.cache.kv_cache_tokens or 1 << 16) // block_size
    limits = SchedulerLimits(
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens or max(2048, scheduler.max_num_seqs),
        num_blocks=num_blocks,
        block_size=block_size,
        eos_token_ids=frozenset((257,)),
        model_id="fake",
        prefix_caching=config.cache.prefix_caching,
        policy=scheduler.policy,
        faults=config.faults,
        max_steps_in_flight=2 if scheduler.overlap else 1,
    )
    runner = FakeRunner(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=max_model_len,
        alphabet=ALPHABET,
    )
    return Engine(
        core=EngineCore(Scheduler(limits, time.monotonic, recorder), runner, seed=config.seed),
        tokenizer=fake_tokenizer(),
        config=config,
        resolved=_resolved(limits),
        model_config=ModelConfig(
            family="llama",
            vocab_size=VOCAB_SIZE,
            hidden_size=1,
            intermediate_size=1,
            num_layers=1,
            num_q_heads=1,
            num_kv_heads=1,
            head_dim=1,
            max_position=max_model_len,
        ),
        generation_config=GenerationConfig(eos_token_ids=(257,)),
        fingerprint="fake",
        phases=(StartupPhase("build a fake engine", time.monotonic() - start, "no model"),),
    )


def _resolved(limits: SchedulerLimits) -> ResolvedConfig:
    return ResolvedConfig(
        device="cpu",
        dtype="float32",
        kv_cache_dtype="float32",
        backend="torch",
        invariant=True,
        graphs=False,
        block_size=limits.block_size,
        num_blocks=limits.num_blocks,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        overlap=limits.max_steps_in_flight == 2,
        weight_layout="packed",
        weight_bytes=0,
        kv_bytes_per_token=8,
        graph_bytes=0,
        step_bytes=0,
        activation_bytes=0,
        choices=(),
    )


def fake_tokenizer() -> Tokenizer:
    """Build a tokenizer of 256 bytes and two special tokens, with a chat template; the first ids are printable."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return Tokenizer(backend, named_tokens={"eos_token": _SPECIAL[1]}, chat_template=_TEMPLATE, source="fake")
