"""This module holds the flat public list of ops. It does not know how any of them is computed.

Names are loaded on first use (PEP 562): importing the package costs no torch import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .dispatch import BackendError, available_backends, current_backend, interpreted, use_backend

if TYPE_CHECKING:
    from .activation import gated_activation, ungated_activation
    from .attention import paged_attention_decode, paged_attention_prefill, plan_paged_attention
    from .batch import expand_rows
    from .kv_cache import copy_blocks, plan_write_kv, write_kv
    from .norm import layer_norm, rms_norm
    from .rope import build_cos_sin
    from .sampling import log_softmax_top, sample

__all__ = [
    "BackendError",
    "available_backends",
    "build_cos_sin",
    "copy_blocks",
    "current_backend",
    "expand_rows",
    "gated_activation",
    "interpreted",
    "layer_norm",
    "log_softmax_top",
    "paged_attention_decode",
    "paged_attention_prefill",
    "plan_paged_attention",
    "plan_write_kv",
    "rms_norm",
    "sample",
    "ungated_activation",
    "use_backend",
    "write_kv",
]

_FAMILIES = {
    "activation": ("gated_activation", "ungated_activation"),
    "attention": ("paged_attention_decode", "paged_attention_prefill", "plan_paged_attention"),
    "batch": ("expand_rows",),
    "kv_cache": ("copy_blocks", "plan_write_kv", "write_kv"),
    "norm": ("layer_norm", "rms_norm"),
    "rope": ("build_cos_sin",),
    "sampling": ("log_softmax_top", "sample"),
}


def __getattr__(name: str) -> Any:
    for family, names in _FAMILIES.items():
        if name in names:
            value = getattr(importlib.import_module(f".{family}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
