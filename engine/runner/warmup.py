"""This module holds which kernels an engine needs before it serves. It does not know how they are compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from octavo.kernels.aot.calls import Settings
from octavo.kernels.aot.targets import Model
from octavo.kernels.aot.warm import warm_up

from ..config import DTypeName, ModelConfig
from ..errors import ConfigError
from ..resolve import ResolvedConfig

__all__ = ["kernel_models", "kernel_settings", "warm_kernels"]

_CACHES: Mapping[str, Literal["int8", "e4m3"]] = {"int8": "int8", "fp8": "e4m3"}
"""What kernels call the dtypes of keys and values that are not those of weights."""


def warm_kernels(
    config: ModelConfig,
    resolved: ResolvedConfig,
    *,
    num_valid_ids: int | None,
    on_progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> str:
    """Compile and load every variant of a kernel that this engine can launch; see `octavo.kernels.aot.warm`.

    Args:
        num_valid_ids: ids that the tokenizer has; None: there is none, so all that the logits are wide.
        on_progress: called with (variants ready, variants in all).

    Returns:
        What has been done, in words.

    Raises:
        ConfigError: a kernel does not take this model.
    """
    try:
        warmed = warm_up(
            kernel_models(config, resolved.dtype, num_valid_ids),
            kernel_settings(resolved),
            device=torch.device(resolved.device),
            on_progress=on_progress,
        )
    except ValueError as error:
        raise ConfigError(f"the model cannot run on the triton backend: {error}") from error
    return f"{warmed.num_variants} variants, {warmed.num_variants - warmed.num_compiled} of them compiled before"


def kernel_settings(resolved: ResolvedConfig) -> Settings:
    """Return what the engine's limits add to the model's sizes."""
    return Settings(
        block_size=resolved.block_size,
        cache=_CACHES.get(resolved.kv_cache_dtype, "auto"),
        invariant=resolved.invariant,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_num_seqs=resolved.max_num_seqs,
        max_model_len=resolved.max_model_len,
        num_blocks=resolved.num_blocks + 1,  # and the null block
    )


def kernel_models(config: ModelConfig, dtype: DTypeName, num_valid_ids: int | None) -> list[Model]:
    """Return the sizes that kernels are compiled for: one model for layers with a window, one for those without.

    Which window it is makes no difference.
    """
    windows = {window is None: window for window in map(config.window, range(config.num_layers))}
    rope = config.rope
    return [
        Model(
            num_q_heads=config.num_q_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            dtype=dtype,
            norm="rms_norm" if config.norm == "rms" else "layer_norm",
            activation=config.activation,
            gated=config.gated_mlp,
            rotary=rope is not None,
            rotary_dim=None if rope is None else rope.rotary_dim,
            rope_style="neox" if rope is None else rope.style,
            head_norm=config.qk_norm,
            window=window,
            num_valid_ids=None if num_valid_ids is None else min(num_valid_ids, config.vocab_size),
        )
        for window in windows.values()
    ]
