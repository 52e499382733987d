"""This module holds what kernels are compiled for: GPUs, and the models whose shapes they get. It does not know any
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

from ..common.checks import check_choice

__all__ = ["BUDGETED", "GPUS", "MODELS", "Gpu", "Model", "find_model"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU architecture, as its best-known card has it."""

    arch: int
    """Compute capability times ten."""
    card: str
    num_sms: int
    shared_bytes: int
    """Shared memory of one SM; one CTA can have 1,024 bytes less, which each CTA also costs on top of its own."""
    num_warps: int = 64
    """Most warps of one SM."""

    def ctas_per_sm(self, regs: int, shared_bytes: int, num_warps: int) -> int:
        """Return how many CTAs of a kernel fit on one SM: 65,536 registers, handed out in eights, and its warps."""
        by_regs = 65_536 // (max(regs + 7, 8) // 8 * 8 * 32 * num_warps)
        return min(by_regs, self.shared_bytes // (shared_bytes + 1024), self.num_warps // num_warps, 32)


GPUS: Final = {
    "sm_80": Gpu(80, "A100", 108, 164 * 1024),
    "sm_89": Gpu(89, "RTX 4090", 128, 100 * 1024, 48),
    "sm_90": Gpu(90, "H100 SXM", 132, 228 * 1024),
    "sm_100": Gpu(100, "B200", 148, 228 * 1024),
    "sm_120": Gpu(120, "RTX 5090", 170, 100 * 1024, 48),
}
BUDGETED: Final = ("sm_80", "sm_90", "sm_100")
"""Those whose compiled kernels are held to ceilings."""


_CHOICES: Final = {
    "dtype": ("float32", "float16", "bfloat16"),
    "norm": ("rms_norm", "layer_norm"),
    "activation": ("silu", "gelu", "gelu_tanh"),
    "rope_style": ("neox", "interleaved"),
}


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a decoder that its kernels are compiled for."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    vocab_size: int = 128_256
    dtype: str = "bfloat16"
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    rotary: bool = True
    rotary_dim: int | None = None
    """Elements of a head that are rotated; None: all of them."""
    rope_style: Literal["neox", "interleaved"] = "neox"
    head_norm: bool = False
    window: int | None = None
    num_valid_ids: int | None = None
    """Ids that the tokenizer has, where the logits are wider."""

    def __post_init__(self) -> None:
        """Refuse what no decoder is; raises ValueError."""
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise ValueError(f"{field.name} is {value}; it must be above 0")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_q_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")


MODELS: Final = {
    "llama-3-8b": Model(),
    "mistral-7b": Model(vocab_size=32_768),
    "qwen3-8b": Model(intermediate_size=12_288, vocab_size=151_936, head_norm=True, num_valid_ids=151_669),
    "qwen3-0.6b": Model(16, 8, 128, 1024, 3072, 151_936, head_norm=True, num_valid_ids=151_669),
    "smollm2-135m": Model(9, 3, 64, 576, 1536, 49_152),
    "gpt2": Model(12, 12, 64, 768, 3072, 50_257, norm="layer_norm", activation="gelu_tanh", gated=False, rotary=False),
}


_OPTIONAL: Final = ("rotary_dim", "window", "num_valid_ids")
"""Sizes that may be None."""


def find_model(text: str) -> Model:
    """Return a model by its name, by `field=value,...` over llama-3-8b, or by both: `gpt2,dtype=float16`.

    Raises:
        ValueError: names what is unknown and what is allowed.
    """
    name, *settings = text.split(",")
    if "=" in name:
        name, settings = "llama-3-8b", [name, *settings]
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}, or field=value,... of a model's sizes")
    model = MODELS[name]
    known = {field.name: getattr(model, field.name) for field in fields(Model)}
    changes: dict[str, Any] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in known:
            raise ValueError(f"unknown size {key!r}; known: {', '.join(known)}")
        changes[key] = _parse(key, text, known[key])
    return replace(model, **changes)


def _parse(name: str, text: str, default: object) -> bool | int | str:
    """Return a size as what its default is."""
    if isinstance(default, bool):
        check_choice(name, text, ("true", "false"))
        return text == "true"
    if isinstance(default, int) or name in _OPTIONAL:
        if not text.isdecimal():
            raise ValueError(f"{name} is {text!r}; allowed: an integer above 0")
        return int(text)
    return text
