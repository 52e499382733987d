"""This package holds rotary position embedding (RoPE). It does not know the KV cache.

Rotating q and k happens inside `write_kv`; what is public here is the table it reads.
"""

from __future__ import annotations

from .reference import RopeScaling, RopeStyle, build_cos_sin

__all__ = ["RopeScaling", "RopeStyle", "build_cos_sin"]
