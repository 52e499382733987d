"""This module holds every setting of the engine as small frozen dataclasses. It does not know how "auto" is resolved.

`EngineConfig` composes them; each component is handed only its own part. `None` and "auto" mean "decide from the model
and the hardware", which `resolve.py` does once, at start-up, saying what it chose and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .errors import ConfigError, describe

__all__ = [
    "BackendName",
    "CacheConfig",
    "DTypeName",
    "EngineConfig",
    "FaultConfig",
    "GenerationConfig",
    "ModelConfig",
    "RopeConfig",
    "SchedulerConfig",
    "setting_names",
]

DTypeName = Literal["float32", "float16", "bfloat16"]
BackendName = Literal["torch", "triton"]


def _check(name: str, value: Any, allowed: str, ok: Callable[[Any], bool]) -> None:
    try:
        good = ok(value)
    except TypeError:
        good = False
    if not good:
        raise ConfigError(f"{name} is {describe(value)}; allowed: {allowed}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_flag(name: str, value: Any, *, automatic: bool = False) -> None:
    allowed = "true, false" + (", or left out for automatic" if automatic else "")
    _check(name, value, allowed, lambda v: isinstance(v, bool) or (automatic and v is None))


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of one model.

    `style` is how pairs are laid out: "neox" rotates (i, i + rotary_dim/2), "interleaved" rotates (2i, 2i + 1).
    `scaling` names the frequency rule: linear (position interpolation), llama3 (Llama 3.1's piecewise rule) or yarn
    (Peng et al. 2023, https://arxiv.org/abs/2309.00071).
    """

    theta: float
    rotary_dim: int
    style: Literal["neox", "interleaved"] = "neox"
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """yarn: cos and sin are multiplied by it; None means 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: round the correction range to whole dimensions, as the original code does."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one decoder, whatever file format it came from. Sizes are counts of elements.

    `vocab_size` is the width of the logits; the tokenizer may be smaller. Linear weights are [out, in].
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    rope: RopeConfig | None = None
    """None: learned absolute positions (GPT-2)."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    """Per layer: how many tokens a query sees, itself included; None: all. Empty: all layers see all."""
    tie_embeddings: bool = False
    dtype: DTypeName = "float32"
    """The checkpoint's own dtype: what "auto" means on a GPU."""

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the fused q, k, v matrix."""
        return (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim

    def window(self, layer: int) -> int | None:
        """Return the sliding window of one layer in tokens, or None where it sees everything."""
        return self.windows[layer] if self.windows else None


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What a checkpoint says of how it wants to be sampled; `None` means it says nothing."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = 64
    """Tokens per block."""
    kv_cache_tokens: int | None = None
    """Size of the pool in tokens, rounded down to whole blocks; None: from the memory there is."""
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """What keys and values are stored as; auto: as dtype. int8 has a scale for each token and head; fp8 (e4m3) two for
    each layer: the checkpoint's, where it has them, else 1."""
    prefix_caching: bool = True
    """Share the blocks of equal beginnings between requests, also of finished ones."""
    gpu_memory_utilization: float = 0.9
    """Part of the GPU memory left beside the weights and the tensors of a step that the pool may take."""

    def __post_init__(self) -> None:
        _check_flag("prefix_caching", self.prefix_caching)
        _check("kv_cache_dtype", self.kv_cache_dtype, "auto, int8, fp8", lambda v: v in ("auto", "int8", "fp8"))
        _check("block_size", self.block_size, "an integer from 1 to 1024", lambda v: _is_int(v) and 1 <= v <= 1024)
        _check(
            "kv_cache_tokens",
            self.kv_cache_tokens,
            f"at least one block ({self.block_size} tokens) and below 2**48, or left out for automatic",
            lambda v: v is None or (_is_int(v) and self.block_size <= v < 2**48),
        )
        _check(
            "gpu_memory_utilization",
            self.gpu_memory_utilization,
            "a number above 0 and at most 1",
            lambda v: not isinstance(v, bool) and 0.0 < v <= 1.0,
        )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How many tokens and sequences run in one step, and in which order requests are taken."""

    max_num_seqs: int = 256
    """Sequences that run together."""
    max_num_batched_tokens: int | None = None
    """Token budget of one step; None: 2,048 on a GPU, 512 on a CPU."""
    max_model_len: int | None = None
    """Longest prompt plus output in tokens; None: what the model and the KV pool allow."""
    policy: Literal["fcfs", "priority"] = "fcfs"
    """fcfs: in order of arrival; priority: by the requests' priority, then arrival."""
    overlap: bool | None = None
    """Schedule the next step while the device runs this one; None: on a GPU."""

    def __post_init__(self) -> None:
        _check(
            "max_num_seqs", self.max_num_seqs, "an integer from 1 to 65536", lambda v: _is_int(v) and 1 <= v <= 65536
        )
        for name in ("max_num_batched_tokens", "max_model_len"):
            _check(
                name,
                getattr(self, name),
                "an integer from 1 to 2**31 - 1, or left out for automatic",
                lambda v: v is None or (_is_int(v) and 1 <= v < 2**31),
            )
        _check("policy", self.policy, "fcfs, priority", lambda v: v in ("fcfs", "priority"))
        _check_flag("overlap", self.overlap, automatic=True)


@dataclass(frozen=True, slots=True)
class FaultConfig:
    """Faults to inject, for tests only: none of them may change a single token."""

    preempt_every: int = 0
    """Preempt the youngest running request every so many steps; 0: never."""
    miss_prefix_cache: bool = False
    """Treat every prefix lookup as a miss while still filling the cache."""

    def __post_init__(self) -> None:
        _check("preempt_every", self.preempt_every, "an integer of at least 0", lambda v: _is_int(v) and v >= 0)
        _check_flag("miss_prefix_cache", self.miss_prefix_cache)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything a user can set, by the name it has in Python, on the command line and in octavo.toml."""

    model: str = "smollm2-135m"
    """A bundled name, a folder, a .gguf file or a hub id."""
    tokenizer: str | None = None
    """A folder to take the tokenizer from, if not the model's own."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights of the model's shape, nothing read but its config."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of weights and activations; auto: float32 on a CPU, the checkpoint's own on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to run on."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """Whose ops to run: the torch reference or the Triton kernels."""
    invariant: bool = False
    """Bit-equal tokens and logprobs whatever the batch, chunking, cache or preemption; slower."""
    graphs: bool | None = None
    """Run decode steps as captured CUDA graphs; None: on a GPU. A CPU repeats the same calls instead: for tests."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: the sampling defaults that come with the model, where it has any; none: octavo's own."""
    special_in_prompts: bool = True
    """Take the text of a special token in a prompt as that token; without, refuse such a prompt. In messages it is
    never more than text."""
    seed: int = 0
    """Where the seeds of requests that give none come from."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)

    def __post_init__(self) -> None:
        _check_flag("invariant", self.invariant)
        _check_flag("graphs", self.graphs, automatic=True)
        _check_flag("special_in_prompts", self.special_in_prompts)
        _check(
            "tokenizer",
            self.tokenizer,
            "a folder's path, or none",
            lambda v: v is None or (isinstance(v, str) and v != ""),
        )
        _check("model", self.model, "a non-empty name or path", lambda v: isinstance(v, str) and v != "")
        _check("load_format", self.load_format, "auto, dummy", lambda v: v in ("auto", "dummy"))
        _check(
            "dtype",
            self.dtype,
            "auto, float32, float16, bfloat16",
            lambda v: v in ("auto", "float32", "float16", "bfloat16"),
        )
        _check("device", self.device, "auto, cpu, cuda", lambda v: v in ("auto", "cpu", "cuda"))
        _check("backend", self.backend, "auto, torch, triton", lambda v: v in ("auto", "torch", "triton"))
        _check("generation_config", self.generation_config, "auto, none", lambda v: v in ("auto", "none"))
        _check("seed", self.seed, "an integer from 0 to 2**63 - 1", lambda v: _is_int(v) and 0 <= v < 2**63)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """Build from flat names: `{"model": ..., "block_size": 16, "max_num_seqs": 8}`.

        A table named after a part, as in octavo.toml's `[cache]`, may hold that part's settings instead.

        Raises:
            ConfigError: a name is unknown, given twice, or has a value that is not allowed.
        """
        owners = setting_names()
        values: dict[str, dict[str, Any]] = {part: {} for part in ("", *_PARTS)}
        for name, value in settings.items():
            entries = [(name, value)]
            if name in _PARTS and isinstance(value, Mapping):
                entries = list(value.items())
                for key in value:
                    if owners.get(key) != name:
                        allowed = ", ".join(known for known, owner in owners.items() if owner == name)
                        raise ConfigError(f"unknown setting {key!r} in [{name}]; allowed: {allowed}")
            for key, entry in entries:
                if key not in owners:
                    raise ConfigError(f"unknown setting {key!r}; allowed: {', '.join(owners)}")
                if key in values[owners[key]]:
                    raise ConfigError(f"setting {key!r} is given twice")
                values[owners[key]][key] = entry
        parts = {part: kind(**values[part]) for part, kind in _PARTS.items()}
        return cls(**values[""], **parts)


_PARTS: dict[str, type] = {"cache": CacheConfig, "scheduler": SchedulerConfig, "faults": FaultConfig}


def setting_names() -> dict[str, str]:
    """Return every flat setting name and the part it belongs to; "" is `EngineConfig` itself."""
    names = {each.name: "" for each in fields(EngineConfig) if each.name not in _PARTS}
    for part, kind in _PARTS.items():
        names |= {each.name: part for each in fields(kind)}
    return names
