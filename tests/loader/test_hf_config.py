"""config.json and generation_config.json: what is honoured, and that everything else is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from octavo.engine.config import ModelConfig, RopeConfig
from octavo.engine.errors import CheckpointError
from octavo.engine.loader import resolve_model
from octavo.engine.loader.fields import Fields
from octavo.engine.loader.hf_config import parse_generation_config, parse_model_config
from octavo.engine.loader.mapping import hf_sources

Config = dict[str, Any]


def read(folder: Path, config: Config | bytes, generation: Config | bytes | None = None) -> ModelConfig:
    raw = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "config.json").write_bytes(raw)
    if generation is not None:
        raw = generation if isinstance(generation, bytes) else json.dumps(generation).encode()
        (folder / "generation_config.json").write_bytes(raw)
    return resolve_model(str(folder), load_format="dummy").model_config


def rope(folder: Path, config: Config, **fields: Any) -> RopeConfig:
    found = read(folder, config | fields).rope
    assert found is not None
    return found


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def test_both_spellings_of_rope(tmp_path: Path, llama_config: Config) -> None:
    plain = RopeConfig(theta=500000.0, rotary_dim=8)
    assert rope(tmp_path, llama_config, rope_theta=500000) == plain
    assert rope(tmp_path, llama_config, rope_theta=None, rope_parameters={"rope_theta": 500000.0}) == plain
    assert rope(tmp_path, llama_config, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"}) == plain
    assert rope(tmp_path, llama_config, rope_theta=500000.0, rope_scaling={"type": "default"}) == plain
    del llama_config["rope_theta"]
    assert rope(tmp_path, llama_config).theta == 10000.0


def test_scaled_ropes(tmp_path: Path, llama_config: Config) -> None:
    linear = rope(tmp_path, llama_config, rope_scaling={"type": "linear", "factor": 2})
    assert linear == RopeConfig(theta=10000.0, rotary_dim=8, scaling="linear", factor=2.0)
    llama3 = RopeConfig(
        theta=10000.0, rotary_dim=8, scaling="llama3", factor=8.0, original_max_position=16, high_freq_factor=4.0
    )
    assert rope(tmp_path, llama_config, rope_scaling=LLAMA3) == llama3
    assert rope(tmp_path, llama_config, rope_parameters=LLAMA3 | {"rope_theta": 10000.0}) == llama3
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    found = rope(tmp_path, llama_config, rope_scaling=yarn)
    assert (found.scaling, found.factor, found.original_max_position) == ("yarn", 4.0, 32)
    assert (found.beta_fast, found.beta_slow, found.attention_factor, found.truncate) == (32.0, 1.0, None, True)
    more = {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "truncate": False}
    found = rope(tmp_path, llama_config, rope_scaling=yarn | more)
    assert (found.beta_fast, found.beta_slow, found.attention_factor, found.truncate) == (16.0, 2.0, 1.5, False)
    found = rope(tmp_path, llama_config, rope_scaling=yarn | {"mscale": 2.0, "mscale_all_dim": 1.0})
    assert found.attention_factor == pytest.approx((0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1))


def test_yarn_stretches_the_context(tmp_path: Path, llama_config: Config) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert read(tmp_path, llama_config | {"rope_scaling": yarn}).max_position == 256
    assert read(tmp_path, llama_config | {"rope_scaling": yarn, "max_position_embeddings": 300}).max_position == 300


@pytest.mark.parametrize("style", ["llama3", "yarn"])
def test_scaled_ropes_are_read_as_transformers_reads_them(style: str, tmp_path: Path, llama_config: Config) -> None:
    """The frequencies of the fields as we read them are those that transformers computes from the file."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = (
        LLAMA3 if style == "llama3" else {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    )
    config = llama_config | {"model_type": "llama", "rope_scaling": fields, "rope_theta": 500.0}
    found = rope(tmp_path, config)
    theirs, scale = ROPE_INIT_FUNCTIONS[style](AutoConfig.from_pretrained(tmp_path), "cpu")
    for index, frequency in enumerate(theirs.tolist()):
        base = found.theta ** (-2 * index / found.rotary_dim)
        if style == "llama3":
            turns = found.original_max_position * base / (2 * math.pi)
            keep = (turns - found.low_freq_factor) / (found.high_freq_factor - found.low_freq_factor)
        else:
            low, high = (
                found.rotary_dim
                * math.log(found.original_max_position / (beta * 2 * math.pi))
                / (2 * math.log(found.theta))
                for beta in (found.beta_fast, found.beta_slow)
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), found.rotary_dim - 1)
            keep = 1 - (index - low) / (high - low or 0.001)
        keep = min(max(keep, 0.0), 1.0)
        assert frequency == pytest.approx(base * keep + base / found.factor * (1 - keep), rel=1e-5)
    assert scale == pytest.approx(1.0 if style == "llama3" else 0.1 * math.log(found.factor) + 1.0)


def test_windows(tmp_path: Path, llama_config: Config) -> None:
    mistral = llama_config | {"architectures": ["MistralForCausalLM"]}
    assert read(tmp_path, mistral | {"sliding_window": 8}).windows == (8, 8)
    assert read(tmp_path, mistral | {"sliding_window": None}).windows == ()
    assert read(tmp_path, mistral | {"sliding_window": 64}).windows == ()
    assert read(tmp_path, mistral | {"max_position_embeddings": 8192}).windows == (4096, 4096)
    assert read(tmp_path, mistral | {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}).windows == (8, 8)
    for architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        qwen = llama_config | {"architectures": [architecture], "sliding_window": 8}
        assert read(tmp_path, qwen | {"use_sliding_window": False}).windows == ()
        assert read(tmp_path, qwen | {"use_sliding_window": True}).windows == ()
        assert read(tmp_path, qwen | {"use_sliding_window": True, "max_window_layers": 1}).windows == (None, 8)
        kinds = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
        assert read(tmp_path, qwen | kinds).windows == (8, None)


def test_head_dim_is_not_always_a_share_of_hidden_size(tmp_path: Path, llama_config: Config) -> None:
    assert read(tmp_path, llama_config | {"head_dim": 24}).head_dim == 24
    assert read(tmp_path, llama_config | {"architectures": ["Qwen3ForCausalLM"]}).head_dim == 128
    assert read(tmp_path, llama_config | {"head_dim": 16, "hidden_size": 30}).qkv_size == 128


@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_spellings(key: str, value: str, tmp_path: Path, llama_config: Config) -> None:
    del llama_config["torch_dtype"]
    assert read(tmp_path, llama_config | {key: value}).dtype == "bfloat16"


def test_neutral_values_pass(tmp_path: Path, llama_config: Config) -> None:
    neutral = {"quantization_config": None, "embedding_multiplier": 1.0, "num_experts": 0, "rope_interleaved": False}
    extra = {"auto_map": {"AutoModel": "evil.Model"}, "pretraining_tp": 1, "partial_rotary_factor": 1.0}
    assert read(tmp_path, llama_config | neutral | extra) == read(tmp_path, llama_config)


GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 48,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
}
INTEGERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30, True, 2.0, "2", [2], {"a": 2}, 1e400, -(2**63)])
@pytest.mark.parametrize("key", INTEGERS)
def test_hostile_sizes_are_refused_by_name(key: str, value: Any, tmp_path: Path, llama_config: Config) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        read(tmp_path, json.dumps(llama_config | {key: value}).replace("Infinity", "1e400").encode())
    assert caught.value.file == "config.json"
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("key", [key for key in INTEGERS if key not in ("head_dim", "num_key_value_heads")])
def test_missing_sizes_are_refused_by_name(key: str, tmp_path: Path, llama_config: Config) -> None:
    for config in (llama_config | {key: None}, {name: value for name, value in llama_config.items() if name != key}):
        with pytest.raises(CheckpointError, match=key):
            read(tmp_path, config)


REFUSED: list[tuple[str, Config]] = [
    ("rms_norm_eps", {"rms_norm_eps": 0}),
    ("rms_norm_eps", {"rms_norm_eps": -1e-6}),
    ("rms_norm_eps", {"rms_norm_eps": "1e-6"}),
    ("rms_norm_eps", {"rms_norm_eps": 2.0}),
    ("rms_norm_eps", {"rms_norm_eps": True}),
    ("rope_theta", {"rope_theta": 0}),
    ("rope_theta", {"rope_theta": -10000.0}),
    ("rope_theta", {"rope_theta": [10000.0]}),
    ("head_dim", {"head_dim": 7}),
    ("hidden_size", {"hidden_size": 33}),
    ("head_dim", {"hidden_size": 12}),
    ("num_key_value_heads", {"num_key_value_heads": 3}),
    ("num_key_value_heads", {"num_key_value_heads": 8}),
    ("hidden_act", {"hidden_act": "relu"}),
    ("hidden_act", {"hidden_act": ["silu"]}),
    ("tie_word_embeddings", {"tie_word_embeddings": 1}),
    ("attention_bias", {"attention_bias": "true"}),
    ("torch_dtype", {"torch_dtype": "float8"}),
    ("torch_dtype", {"torch_dtype": 16}),
    ("quantization_config", {"quantization_config": {"quant_method": "awq"}}),
    ("sliding_window", {"sliding_window": 8}),
    ("num_local_experts", {"num_local_experts": 8}),
    ("embedding_multiplier", {"embedding_multiplier": 12.0}),
    ("final_logit_softcapping", {"final_logit_softcapping": 30.0}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("rope_scaling", {"rope_scaling": "linear"}),
    ("rope_scaling", {"rope_scaling": [1]}),
    ("rope_scaling", {"rope_scaling": {"type": "linear", "factor": 2.0, "surprise": 1}}),
    ("rope_scaling.factor", {"rope_scaling": {"type": "linear"}}),
    ("rope_scaling.factor", {"rope_scaling": {"type": "linear", "factor": 0.5}}),
    ("rope_scaling.type", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "longrope"}}),
    ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": 3}}),
    ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
    ("high_freq_factor", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}),
    ("low_freq_factor", {"rope_scaling": LLAMA3 | {"low_freq_factor": 0.0}}),
    ("rope_parameters", {"rope_scaling": {"type": "yarn", "factor": 1e6, "original_max_position_embeddings": 4096}}),
    ("architectures", {"architectures": None}),
    ("architectures", {"architectures": "LlamaForCausalLM"}),
    ("architectures", {"architectures": []}),
    ("architectures", {"architectures": [["LlamaForCausalLM"]]}),
    ("architectures", {"architectures": ["LlamaModel"]}),
    ("architectures", {"architectures": ["MixtralForCausalLM"]}),
    ("eos_token_id", {"eos_token_id": 48}),
    ("eos_token_id", {"eos_token_id": -1}),
    ("eos_token_id", {"eos_token_id": True}),
    ("eos_token_id", {"eos_token_id": [1, "2"]}),
    ("eos_token_id", {"eos_token_id": list(range(48)) * 2}),
    ("bos_token_id", {"bos_token_id": 48}),
    ("attention_bias", {"architectures": ["MistralForCausalLM"], "attention_bias": True}),
    ("attention_bias", {"architectures": ["Qwen2ForCausalLM"], "attention_bias": False}),
    ("mlp_bias", {"architectures": ["Qwen3ForCausalLM"], "mlp_bias": True}),
    ("sliding_window", {"architectures": ["MistralForCausalLM"], "sliding_window": 0}),
    ("layer_types", {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]}),
    ("layer_types", {"architectures": ["Qwen2ForCausalLM"], "layer_types": [[], []]}),
    ("layer_types", {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 2}),
    ("layer_types", {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 2}),
    ("layer_types", {"architectures": ["MistralForCausalLM"], "sliding_window": None, "layer_types": [1, 2]}),
    ("scale_attn_by_inverse_layer_idx", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    ("scale_attn_weights", GPT2 | {"scale_attn_weights": False}),
    ("activation_function", GPT2 | {"activation_function": "relu"}),
    ("n_embd", GPT2 | {"n_embd": 30}),
    ("n_inner", GPT2 | {"n_inner": 0}),
    ("n_head", GPT2 | {"n_head": None}),
    ("layer_norm_epsilon", GPT2 | {"layer_norm_epsilon": 0.0}),
]


@pytest.mark.parametrize(
    ("name", "fields"), REFUSED, ids=[f"{name} {index}" for index, (name, _) in enumerate(REFUSED)]
)
def test_what_is_not_supported_is_refused_by_name(
    name: str, fields: Config, tmp_path: Path, llama_config: Config
) -> None:
    with pytest.raises(CheckpointError, match=name):
        read(tmp_path, llama_config | fields)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'\xef\xbb\xbf{"architectures": ["LlamaForCausalLM"]}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 1}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"a": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b" " * (1 << 20) + b"{}",
    ],
    ids=lambda raw: repr(raw[:20]),
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_strict_json_object_is_refused(
    file: str, raw: bytes, tmp_path: Path, llama_config: Config
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, raw if file == "config.json" else llama_config, raw)
    assert caught.value.file == file


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": 48},
        {"temperature": -0.5},
        {"temperature": "1"},
        {"temperature": True},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": 2.5},
        {"top_k": -2},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"do_sample": 1},
    ],
)
def test_bad_sampling_defaults_are_refused_by_name(fields: Config, tmp_path: Path, llama_config: Config) -> None:
    with pytest.raises(CheckpointError, match=next(iter(fields))) as caught:
        read(tmp_path, llama_config, fields)
    assert caught.value.file == "generation_config.json"


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be opened"):
        resolve_model(str(tmp_path))


HOSTILE: list[Any] = [
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**40,
    0.5,
    1e400,
    -0.0,
    True,
    False,
    "",
    "1",
    "yarn",
    "\ud800",
    "x" * 10**5,
]
HOSTILE += [
    [],
    [1],
    [None],
    [[[[]]]],
    ["LlamaForCausalLM"] * 2,
    {},
    {"rope_type": "yarn"},
    {"a": {"b": []}},
    [0] * 10**4,
]


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "GPT2LMHeadModel"]
)
def test_any_value_of_any_field_gives_a_config_or_a_checkpoint_error(architecture: str, llama_config: Config) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale": 1.0} | LLAMA3
    base = GPT2 | llama_config | {"architectures": [architecture], "rope_scaling": yarn | {"rope_type": "yarn"}}
    base |= dict.fromkeys(("sliding_window", "layer_types", "dtype", "n_inner", "use_sliding_window", "do_sample"))
    base |= dict.fromkeys(("temperature", "top_k", "top_p", "quantization_config", "attention_bias", "mlp_bias"))
    variants = [base | {key: value} for key in base for value in HOSTILE]
    variants += [base | {"rope_scaling": yarn | {key: value}} for key in yarn for value in HOSTILE]
    messages: list[str] = []
    for variant in variants:
        fields = Fields(variant, "config.json")
        try:
            config = parse_model_config(fields)
            parse_generation_config(fields, config.vocab_size, sampling=True)
        except CheckpointError as error:
            messages.append(str(error))
            continue
        assert len(hf_sources(config)) <= 16 * 1024
        assert config.num_q_heads % config.num_kv_heads == 0
        assert config.head_dim >= 1
        assert 0.0 < config.norm_eps <= 1.0
    assert 0.3 < len(messages) / len(variants) < 1.0
    assert max(map(len, messages)) < 1000
