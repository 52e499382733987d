"""GGUF files written by the gguf package load as the weights that went in; damaged and hostile ones are refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from octavo.engine.config import RopeConfig
from octavo.engine.errors import CheckpointError
from octavo.engine.loader import Checkpoint, resolve_model

VOCAB, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 40, 256, 512, 4, 2, 64, 2
Load = Callable[..., dict[str, torch.Tensor]]
Count = Callable[[int, int], int]

METADATA: dict[str, tuple[str, Any]] = {
    "llama.block_count": ("uint32", LAYERS),
    "llama.context_length": ("uint32", 128),
    "llama.embedding_length": ("uint32", HIDDEN),
    "llama.feed_forward_length": ("uint32", INNER),
    "llama.attention.head_count": ("uint32", HEADS),
    "llama.attention.head_count_kv": ("uint32", KV_HEADS),
    "llama.attention.layer_norm_rms_epsilon": ("float32", 1e-5),
    "llama.rope.freq_base": ("float32", 50000.0),
    "llama.rope.dimension_count": ("uint32", HEAD_DIM),
    "llama.vocab_size": ("uint32", VOCAB),
    "tokenizer.ggml.model": ("string", "gpt2"),
    "tokenizer.ggml.tokens": ("array", [f"t{number}é" for number in range(VOCAB - 2)]),
    "tokenizer.ggml.scores": ("array", [0.5, -1.25]),
    "tokenizer.ggml.token_type": ("array", [1] * 4),
    "tokenizer.ggml.eos_token_id": ("uint32", 2),
    "tokenizer.ggml.eot_token_id": ("uint32", 5),
    "tokenizer.ggml.bos_token_id": ("uint32", 1),
    "tokenizer.ggml.add_bos_token": ("bool", True),
}


def weights(*, tied: bool = False, biases: bool = False) -> dict[str, np.ndarray]:
    """Return random weights under GGUF's names, in our own order of rows."""
    rng = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        linear = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN)}
        linear |= {"attn_v": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
        linear |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
        for name, shape in linear.items():
            shapes[f"{at}{name}.weight"] = shape
            if biases and name in ("attn_q", "attn_k", "attn_v"):
                shapes[f"{at}{name}.bias"] = shape[:1]
        shapes[f"{at}attn_norm.weight"] = shapes[f"{at}ffn_norm.weight"] = (HIDDEN,)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def paired(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Interleave the halves of each head's rows, as the conversion to GGUF does for q and k of llama models."""
    heads = array.reshape(num_heads, 2, HEAD_DIM // 2, -1)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(array.shape)


def stored(name: str, array: np.ndarray) -> np.ndarray:
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
    return array if heads is None else paired(array, heads)


def write(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    kind: Kind = Kind.F32,
    metadata: Mapping[str, tuple[str, Any]] = METADATA,
    architecture: str = "llama",
    alignment: int | None = None,
) -> dict[str, np.ndarray]:
    """Write a file with matrices as `kind`; return what a reader must find under each name."""
    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, (sort, value) in metadata.items():
        getattr(writer, f"add_{sort}")(key, value)
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        raw = stored(name, array)
        one = kind if array.ndim > 1 else Kind.F32
        data = gguf.quants.quantize(raw, one)
        writer.add_tensor(name, data, raw_dtype=one)
        back = gguf.quants.dequantize(data, one)
        found[name] = back if raw is array else unpaired(back)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def unpaired(array: np.ndarray) -> np.ndarray:
    """Undo `paired`, row by row, in a way that shares nothing with the loader's."""
    found = np.empty_like(array)
    for row in range(len(array)):
        head, inside = divmod(row, HEAD_DIM)
        half, index = divmod(inside, HEAD_DIM // 2)
        found[row] = array[head * HEAD_DIM + 2 * index + half]
    return found


def assert_loaded(params: Mapping[str, torch.Tensor], found: Mapping[str, np.ndarray]) -> None:
    def check(target: str, *names: str) -> None:
        wanted = torch.from_numpy(np.concatenate([found[name] for name in names]))
        assert torch.equal(params[target], wanted), target
        checked.add(target)

    checked: set[str] = set()
    check("embedding.weight", "token_embd.weight")
    check("final_norm.weight", "output_norm.weight")
    if "output.weight" in found:
        check("lm_head.weight", "output.weight")
    for layer in range(LAYERS):
        theirs, ours = f"blk.{layer}.", f"layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{theirs}attn_q.{kind}" in found:
                check(f"{ours}qkv.{kind}", *(f"{theirs}attn_{one}.{kind}" for one in "qkv"))
        check(f"{ours}gate_up.weight", f"{theirs}ffn_gate.weight", f"{theirs}ffn_up.weight")
        check(f"{ours}o.weight", f"{theirs}attn_output.weight")
        check(f"{ours}down.weight", f"{theirs}ffn_down.weight")
        check(f"{ours}attention_norm.weight", f"{theirs}attn_norm.weight")
        check(f"{ours}mlp_norm.weight", f"{theirs}ffn_norm.weight")
    assert checked == set(params)


def can_quantise(kind: Kind) -> bool:
    try:
        gguf.quants.quantize(np.ones((2, 256), np.float32), kind)
    except NotImplementedError:
        return False
    return kind.name[0] not in "I" or kind.name.startswith("IQ")


KINDS = [kind for kind in Kind if can_quantise(kind)]


def test_the_package_can_write_many_types() -> None:
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0"} <= {kind.name for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_every_type_loads_as_the_package_dequantises_it(kind: Kind, tmp_path: Path, load: Load) -> None:
    found = write(tmp_path / "m.gguf", weights(), kind=kind)
    assert_loaded(load(resolve_model(str(tmp_path / "m.gguf"))), found)


@pytest.mark.parametrize(
    "kind", [kind for kind in gguf.quants._type_traits if kind not in KINDS], ids=lambda kind: kind.name
)
def test_types_that_can_only_be_read(kind: Kind, tmp_path: Path, load: Load) -> None:
    """Blocks of random bytes, their scales kept small, load as the package dequantises them."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    arrays = weights()
    raw = rng.integers(0, 50, (HIDDEN, HIDDEN // block_elements * block_bytes), np.uint8)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (sort, value) in METADATA.items():
        getattr(writer, f"add_{sort}")(key, value)
    for name, array in arrays.items():
        if name == "blk.0.attn_output.weight":
            writer.add_tensor(name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(name, stored(name, array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(raw, kind)
    assert np.isfinite(wanted).all()
    assert torch.equal(load(resolve_model(str(path)))["layers.0.o.weight"], torch.from_numpy(wanted))


def test_metadata_becomes_configs(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", weights(), kind=Kind.Q8_0)
    checkpoint = resolve_model(str(tmp_path / "m.gguf"))
    config = checkpoint.model_config
    assert (config.family, config.vocab_size, config.hidden_size, config.intermediate_size) == ("llama", 40, 256, 512)
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 64)
    assert (config.norm_eps, config.max_position, config.tie_embeddings) == (1e-5, 128, False)
    assert config.rope == RopeConfig(theta=50000.0, rotary_dim=64)
    assert config.dtype == "bfloat16"
    assert checkpoint.generation_config.eos_token_ids == (2, 5)
    assert checkpoint.generation_config.bos_token_id == 1
    wanted = {key: value for key, (_, value) in METADATA.items() if key.startswith("tokenizer.")}
    assert checkpoint.tokenizer_metadata == wanted
    assert checkpoint.tokenizer_folder is None


def test_tied_biased_and_aligned_otherwise(tmp_path: Path, load: Load) -> None:
    found = write(tmp_path / "m.gguf", weights(tied=True, biases=True), kind=Kind.F16, alignment=256)
    checkpoint = resolve_model(str(tmp_path / "m.gguf"))
    config = checkpoint.model_config
    assert (config.tie_embeddings, config.qkv_bias, config.o_bias, config.dtype) == (True, True, False, "float16")
    assert_loaded(load(checkpoint), found)


def test_large_tensors_are_read_in_several_chunks(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.engine.loader.checkpoint.CHUNK_BYTES", 70 * HIDDEN * 4)
    found = write(tmp_path / "m.gguf", weights(), kind=Kind.Q5_1)
    assert_loaded(load(resolve_model(str(tmp_path / "m.gguf"))), found)


def test_scaled_ropes(tmp_path: Path) -> None:
    scaling = {
        "llama.rope.scaling.type": ("string", "yarn"),
        "llama.rope.scaling.factor": ("float32", 4.0),
        "llama.rope.scaling.original_context_length": ("uint32", 32),
    }
    write(tmp_path / "yarn.gguf", weights(), metadata=METADATA | scaling)
    rope = RopeConfig(theta=50000.0, rotary_dim=64, scaling="yarn", factor=4.0, original_max_position=32)
    assert resolve_model(str(tmp_path / "yarn.gguf")).model_config.rope == rope
    scaling["llama.rope.scaling.type"] = ("string", "linear")
    write(tmp_path / "linear.gguf", weights(), metadata=METADATA | scaling)
    rope = RopeConfig(theta=50000.0, rotary_dim=64, scaling="linear", factor=4.0)
    assert resolve_model(str(tmp_path / "linear.gguf")).model_config.rope == rope


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recovered_from_its_frequencies(factor: float, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": factor, "low_freq_factor": 1.0}
    parameters |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 50000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    divisors = (plain / scaled).numpy()
    arrays = {"rope_freqs.weight": divisors} | weights()
    write(tmp_path / "m.gguf", arrays)
    rope = resolve_model(str(tmp_path / "m.gguf")).model_config.rope
    assert rope is not None
    assert (rope.scaling, rope.original_max_position) == ("llama3", 8192)
    assert rope.factor == pytest.approx(factor, rel=1e-4)
    divisors[3] *= 1.01
    write(tmp_path / "m.gguf", arrays)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight.*only one supported"):
        resolve_model(str(tmp_path / "m.gguf"))


NO = object()
BAD_METADATA: list[tuple[str, str, Any]] = [
    ("llama.block_count", "uint32", 0),
    ("llama.block_count", "uint32", 10**9),
    ("llama.block_count", "uint32", 3),
    ("llama.block_count", "string", "2"),
    ("llama.block_count", "float32", 2.0),
    ("llama.block_count", "", NO),
    ("llama.embedding_length", "int32", -256),
    ("llama.embedding_length", "uint32", 128),
    ("llama.feed_forward_length", "uint64", 2**63),
    ("llama.feed_forward_length", "array", [512, 256]),
    ("llama.attention.head_count", "uint32", 0),
    ("llama.attention.head_count", "bool", True),
    ("llama.attention.head_count_kv", "uint32", 3),
    ("llama.attention.key_length", "uint32", 63),
    ("llama.attention.value_length", "uint32", 32),
    ("llama.attention.layer_norm_rms_epsilon", "float32", float("nan")),
    ("llama.attention.layer_norm_rms_epsilon", "float32", 0.0),
    ("llama.rope.freq_base", "float32", float("inf")),
    ("llama.rope.dimension_count", "uint32", 32),
    ("llama.rope.scaling.type", "string", "longrope"),
    ("llama.context_length", "uint32", 0),
    ("llama.vocab_size", "uint32", 2**31),
    ("llama.vocab_size", "uint32", 41),
    ("llama.expert_count", "uint32", 8),
    ("split.count", "uint16", 2),
    ("tokenizer.ggml.tokens", "array", ["a"] * 41),
    ("tokenizer.ggml.eos_token_id", "uint32", 40),
    ("tokenizer.ggml.bos_token_id", "int32", -1),
    ("general.alignment", "uint32", 0),
    ("general.alignment", "uint32", 48),
    ("general.alignment", "uint32", 2**31),
    ("general.alignment", "string", "32"),
]


@pytest.mark.parametrize(
    ("key", "sort", "value"), BAD_METADATA, ids=[f"{key} {value!r:.20}" for key, _, value in BAD_METADATA]
)
def test_hostile_metadata_is_refused(key: str, sort: str, value: Any, tmp_path: Path) -> None:
    metadata = {name: entry for name, entry in METADATA.items() if name != key}
    if value is not NO:
        metadata[key] = (sort, value)
    write(tmp_path / "m.gguf", weights(), metadata=metadata)
    with pytest.raises(CheckpointError) as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    assert caught.value.file == "m.gguf"
    assert key != "general.alignment" or "general.alignment is" in str(caught.value)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", weights(), architecture="qwen2")
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'qwen2'; supported: llama"):
        resolve_model(str(tmp_path / "m.gguf"))


def test_the_set_of_tensors_must_be_exact(tmp_path: Path) -> None:
    path, good = tmp_path / "m.gguf", weights()
    cases = {
        "is missing": {name: array for name, array in good.items() if name != "blk.1.ffn_up.weight"},
        "is missing.*": {name: array for name, array in good.items() if name != "token_embd.weight"},
        "is not a tensor": good | {"blk.2.ffn_up.weight": good["blk.1.ffn_up.weight"]},
        "has shape": good | {"blk.1.ffn_up.weight": good["blk.1.ffn_up.weight"][1:]},
    }
    for message, arrays in cases.items():
        write(path, arrays)
        with pytest.raises(CheckpointError, match=message):
            resolve_model(str(path))


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "m.gguf"
    for kind, value in ((Kind.F32, np.nan), (Kind.F16, np.inf), (Kind.Q8_0, None)):
        arrays = weights()
        if value is not None:
            arrays["blk.1.ffn_up.weight"][-1, -1] = value
        write(path, arrays, kind=kind)
        checkpoint = resolve_model(str(path))
        if value is None:
            entry = entry_of(checkpoint, "blk.1.ffn_up.weight")
            raw = bytearray(path.read_bytes())
            raw[entry : entry + 34] = np.float16(np.inf).tobytes() + b"\0" * 32  # inf times 0: NaN
            path.write_bytes(raw)
            checkpoint = resolve_model(str(path))
        with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
            load(checkpoint)
        assert caught.value.tensor == "blk.1.ffn_up.weight"


def entry_of(checkpoint: Checkpoint, name: str) -> int:
    store = checkpoint._store
    assert store is not None
    return store.entries[name].offset


def raw_file(*, counts: tuple[int, int] = (0, 0), version: int = 3, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + body


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor(name: bytes, sizes: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


PAD = b"\0" * 4096
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "are needed|run past"),
    "cut in the magic": (b"GG", "run past"),
    "another magic": (b"GGML" + PAD, "does not begin"),
    "version 1": (raw_file(version=1) + PAD, "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + PAD, "little-endian"),
    "cut in the counts": (raw_file()[:15], "run past"),
    "2**63 tensors": (raw_file(counts=(2**63, 0)) + PAD, "cannot fit"),
    "2**63 keys": (raw_file(counts=(0, 2**63)) + PAD, "cannot fit"),
    "a key of 2**63 bytes": (raw_file(counts=(0, 1), body=text(b"a", 2**63)) + PAD, "text of"),
    "a text past the end": (raw_file(counts=(0, 1), body=text(b"a") + struct.pack("<IQ", 8, 5000)) + PAD, "run past"),
    "a key not in UTF-8": (raw_file(counts=(0, 1), body=text(b"\xff")) + PAD, "not UTF-8"),
    "an unknown value type": (raw_file(counts=(0, 1), body=text(b"a") + struct.pack("<I", 13)) + PAD, "type 13"),
    "an array of arrays": (raw_file(counts=(0, 1), body=text(b"a") + struct.pack("<IIQ", 9, 9, 1)) + PAD, "type 9"),
    "an array of 2**62 numbers": (
        raw_file(counts=(0, 1), body=text(b"a") + struct.pack("<IIQ", 9, 12, 2**62)) + PAD,
        "cannot fit",
    ),
    "an array of 2**61 texts": (
        raw_file(counts=(0, 1), body=text(b"a") + struct.pack("<IIQ", 9, 8, 2**61)) + PAD,
        "cannot fit",
    ),
    "a truth value of 2": (raw_file(counts=(0, 1), body=text(b"a") + struct.pack("<IB", 7, 2)) + PAD, "truth value"),
    "the same key twice": (raw_file(counts=(0, 2), body=(text(b"a") + struct.pack("<IB", 0, 2)) * 2) + PAD, "twice"),
    "no dimensions": (raw_file(counts=(1, 0), body=tensor(b"a", [], 0, 0)) + PAD, "0 dimensions"),
    "2**31 dimensions": (
        raw_file(counts=(1, 0), body=text(b"a") + struct.pack("<I", 2**31)) + PAD,
        "2147483648 dimensions",
    ),
    "a size of 0": (raw_file(counts=(1, 0), body=tensor(b"a", [0, 2**40], 0, 0)) + PAD, "has sizes"),
    "sizes that overflow": (raw_file(counts=(1, 0), body=tensor(b"a", [2**40] * 4, 0, 0)) + PAD, "ends at byte"),
    "an unknown type": (raw_file(counts=(1, 0), body=tensor(b"a", [32], 31, 0)) + PAD, "has type 31"),
    "an integer type": (raw_file(counts=(1, 0), body=tensor(b"a", [32], 26, 0)) + PAD, "has type 26"),
    "half a block": (raw_file(counts=(1, 0), body=tensor(b"a", [48, 2], 8, 0)) + PAD, "rows of 32"),
    "a quantised vector": (raw_file(counts=(1, 0), body=tensor(b"a", [64], 8, 0)) + PAD, "vectors are not"),
    "an offset out of place": (raw_file(counts=(1, 0), body=tensor(b"a", [32], 0, 32)) + PAD, "not at 0"),
    "an offset that overflows": (raw_file(counts=(1, 0), body=tensor(b"a", [32], 0, 2**64 - 32)) + PAD, "not at 0"),
    "an overlap": (
        raw_file(counts=(2, 0), body=tensor(b"a", [32], 0, 0) + tensor(b"b", [32], 0, 96)) + PAD,
        "begins at byte 96",
    ),
    "a hole": (
        raw_file(counts=(2, 0), body=tensor(b"a", [32], 0, 0) + tensor(b"b", [32], 0, 160)) + PAD,
        "begins at byte 160",
    ),
    "the same tensor twice": (
        raw_file(counts=(2, 0), body=tensor(b"a", [32], 0, 0) + tensor(b"a", [32], 0, 128)) + PAD,
        "is there twice",
    ),
    "bytes after the end": (raw_file(counts=(1, 0), body=tensor(b"a", [32], 0, 0)) + PAD, "where its table says"),
    "nothing in it": (raw_file() + b"\0" * 8, "architecture"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_file_is_refused(fault: str, tmp_path: Path) -> None:
    raw, message = BAD_FILES[fault]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(tmp_path / "m.gguf"))


def test_metadata_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_file(counts=(0, 1), body=text(b"a") + struct.pack("<IIQ", 9, 0, 80 << 20)))
    os.truncate(path, 100 << 20)
    with pytest.raises(CheckpointError, match="run past 67108864 bytes"):
        resolve_model(str(path))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, count: Count) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights(), kind=Kind.Q4_0)
    raw = path.read_bytes()
    for size in np.linspace(0, len(raw) - 64, count(60, 1500)).astype(int):
        os.truncate(path, 0)
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError):
            resolve_model(str(path))


def test_a_file_shortened_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights(), kind=Kind.Q4_0)
    checkpoint = resolve_model(str(path))

    def allocate(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == "layers.1.qkv.weight":
            os.truncate(path, entry_of(checkpoint, "blk.1.attn_q.weight") + 50)
        return torch.empty(shape)

    with pytest.raises(CheckpointError, match="too early") as caught:
        checkpoint.load_weights(allocate, lambda name, tensor: None)
    assert caught.value.tensor == "blk.1.attn_q.weight"


def test_flipped_bytes_give_a_checkpoint_error_or_weights(tmp_path: Path, load: Load, count: Count, seed: int) -> None:
    path = tmp_path / "m.gguf"
    write(path, weights(tied=True), kind=Kind.Q4_1)
    good = path.read_bytes()
    head_bytes = entry_of(resolve_model(str(path)), "token_embd.weight")
    rng = np.random.default_rng(seed)
    refused = {True: 0, False: 0}
    trials = count(60, 2000)
    for trial in range(trials):
        in_head = trial % 3 > 0
        raw = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(0, head_bytes) if in_head else rng.integers(head_bytes, len(good))
            raw[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
        try:
            params = load(resolve_model(str(path)))
        except CheckpointError:
            refused[in_head] += 1
        else:
            assert all(bool(tensor.isfinite().all()) for tensor in params.values())
    # Flips in token texts and in weights are not faults of the file's structure.
    assert refused[True] > 0.5 * 2 / 3 * trials
    assert refused[False] < trials / 3


def test_the_bundled_model_is_read_as_transformers_reads_it(load: Load) -> None:
    """Two layers, dequantised and put in our order, are bit-equal to transformers' own conversion of the file."""
    from octavo.engine.loader.bundled import bundled_path

    reader = gguf.GGUFReader(bundled_path("smollm2-135m"))
    checkpoint = resolve_model("smollm2-135m")
    config = checkpoint.model_config
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.tie_embeddings, config.norm_eps) == (True, 1e-5)
    assert checkpoint.generation_config.eos_token_ids == (2,)
    assert checkpoint.tokenizer_metadata is not None
    field = reader.fields["tokenizer.ggml.tokens"]
    assert checkpoint.tokenizer_metadata["tokenizer.ggml.tokens"] == field.contents()
    params = load(checkpoint)
    theirs = {one.name: one for one in reader.tensors}
    for layer in (0, 29):
        parts = []
        for name, heads in (("attn_q", 9), ("attn_k", 3), ("attn_v", 0)):
            one = theirs[f"blk.{layer}.{name}.weight"]
            matrix = torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type))
            if heads:
                matrix = torch.stack([matrix[0::2].view(heads, 32, 576), matrix[1::2].view(heads, 32, 576)], 1)
            parts.append(matrix.reshape(-1, 576))
        assert torch.equal(params[f"layers.{layer}.qkv.weight"], torch.cat(parts))
    assert len(params) == len(checkpoint.shapes)
