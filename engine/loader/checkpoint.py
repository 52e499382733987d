"""This module holds `Checkpoint`, one model wherever its files lie, and finds it by name. It does not know modules."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import GenerationConfig, ModelConfig
from ..errors import CheckpointError, ConfigError
from ..footprint import weight_shapes
from .bundled import BUNDLED, BUNDLED_SAMPLING, bundled_path
from .dummy import fill_dummy
from .gguf_config import ROPE_FACTORS, parse_gguf_configs, tokenizer_metadata
from .hf_config import read_configs
from .mapping import Source, gguf_sources, hf_sources, match
from .safetensors import open_safetensors
from .store import Entry, TensorStore

__all__ = ["Checkpoint", "resolve_model"]

CHUNK_BYTES = 4 << 20
"""Rows are read in pieces of at most this many bytes of float32 (or one row): what a load holds beside the weights."""
FINGERPRINT_BYTES = 256

Allocate = Callable[[str, tuple[int, ...]], torch.Tensor]
OnLoaded = Callable[[str, torch.Tensor], None]
Progress = Callable[[int, int], None]


class Checkpoint:
    """One model: its configs, where its tokenizer is, and its weights, checked but not read yet.

    Attributes:
        source_name: what the user asked for.
        model_config: the decoder's shape.
        generation_config: how it wants to be sampled.
        tokenizer_folder: the folder of its tokenizer.json, or None.
        tokenizer_metadata: a GGUF file's `tokenizer.*` keys and values, or None.
        shapes: every parameter's name and shape, in the order of the forward pass.
    """

    def __init__(
        self,
        source_name: str,
        configs: tuple[ModelConfig, GenerationConfig],
        *,
        store: TensorStore | None,
        sources: list[Source],
        ignored: tuple[str, ...] = (),
        tokenizer: Path | Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.source_name = source_name
        self.model_config, self.generation_config = configs
        self.tokenizer_folder = tokenizer if isinstance(tokenizer, Path) else None
        self.tokenizer_metadata = None if isinstance(tokenizer, Path) else tokenizer
        self.shapes: Mapping[str, tuple[int, ...]] = weight_shapes(self.model_config)
        self._store = store
        self._seed = seed
        self._parts: dict[str, list[tuple[Source, Entry]]] = {name: [] for name in self.shapes}
        if store is None:
            return
        own_shapes = {name: entry.shape for name, entry in store.entries.items()}
        found = match(sources, own_shapes, file=store.name, ignored=ignored)
        for source in sources:
            entry = store.entries[found[source.name]]
            store.check_loadable(entry)
            self._parts[source.target].append((source, entry))

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of all parameters in `dtype`."""
        return sum(map(math.prod, self.shapes.values())) * dtype.itemsize

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell models apart: a digest of config, tensor table and a little of each tensor."""
        digest = hashlib.sha256(repr(sorted(asdict(self.model_config).items())).encode())
        digest.update(b"weights" if self._store else f"dummy {self._seed}".encode())
        for parts in self._parts.values():
            for source, entry in parts:
                digest.update(f"{source.name} {entry.shape} {entry.dtype}\n".encode())
                digest.update(entry.file.read(entry.offset, min(FINGERPRINT_BYTES, entry.num_bytes), entry.name))
        return digest.hexdigest()[:16]

    def load_weights(self, allocate: Allocate, on_loaded: OnLoaded, progress: Progress | None = None) -> None:
        """Read all weights, parameter by parameter in the order of the forward pass.

        No parameter is kept here after `on_loaded`, so that a caller may repack it and let it go.

        Args:
            allocate: gives the tensor for a parameter's name and shape: contiguous, of any floating dtype and device.
            on_loaded: called with the name and the tensor once it is complete.
            progress: called with (bytes done, bytes in all) of the checkpoint.

        Raises:
            CheckpointError: a tensor holds NaN or Inf or does not fit the dtype, or a file has changed since.
        """
        entries = [entry for parts in self._parts.values() for _, entry in parts]
        total, done = sum(entry.num_bytes for entry in entries), 0
        files = dict.fromkeys(entry.file for entry in entries)
        for file in files:
            file.check_unchanged()
        for name, shape in self.shapes.items():
            tensor = allocate(name, shape)
            assert tuple(tensor.shape) == shape, f"{name} was allocated as {tuple(tensor.shape)}, not {shape}"
            if self._store is None:
                fill_dummy(self.model_config, name, tensor, self._seed)
            for source, entry in self._parts[name]:
                for num_bytes in _fill(tensor, source, entry, self._store, self.model_config.head_dim):
                    done += num_bytes
                    if progress is not None:
                        progress(done, total)
            on_loaded(name, tensor)
            del tensor
        for file in files:
            file.check_unchanged()


def _fill(
    tensor: torch.Tensor, source: Source, entry: Entry, store: TensorStore | None, head_dim: int
) -> Iterator[int]:
    """Copy one source into its rows of a parameter, chunk by chunk; yield each chunk's bytes."""
    assert store is not None, "a source has a store"
    rows = entry.shape[0]
    row_elements = math.prod(entry.shape[1:])
    unit = head_dim if source.layout == "paired" else 1
    step = max(1, CHUNK_BYTES // (4 * row_elements * unit)) * unit
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        chunk = store.read_rows(entry, start, stop)
        _check_values(chunk, tensor.dtype, entry)
        if source.layout == "transposed":
            target = tensor[:, start:stop]
            chunk = chunk.T
        else:
            target = tensor[source.row + start : source.row + stop]
        if source.layout == "paired":
            pairs = chunk.view(-1, head_dim // 2, 2, row_elements)
            target = target.view(-1, 2, head_dim // 2, row_elements)
            chunk = pairs.transpose(1, 2)
        with torch.no_grad():
            target.copy_(chunk)
        yield (stop - start) * (entry.num_bytes // rows)


def _check_values(chunk: torch.Tensor, dtype: torch.dtype, entry: Entry) -> None:
    low, high = (float(bound) for bound in torch.aminmax(chunk))  # a NaN anywhere makes both NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(entry.file.name, "holds NaN or infinite values", entry.name)
    largest, limit = max(-low, high), torch.finfo(dtype).max
    if largest > limit:
        name = str(dtype).removeprefix("torch.")
        raise CheckpointError(entry.file.name, f"holds {largest:.4g}; {name} ends at {limit:.4g}", entry.name)


def resolve_model(name: str, *, load_format: Literal["auto", "dummy"] = "auto", seed: int = 0) -> Checkpoint:
    """Find a model and check its files; no weight is read yet.

    Args:
        name: a bundled name, a folder, a .gguf file or a hub id ("organisation/model"), tried in this order.
        load_format: "dummy" reads only the config and makes random weights of its shape.
        seed: of the random weights.

    Raises:
        ConfigError: there is no such model.
        CheckpointError: its files are damaged, hostile or not supported.
    """
    dummy = load_format == "dummy"
    if name in BUNDLED:
        return _open_gguf_checkpoint(name, bundled_path(name), dummy, seed, BUNDLED_SAMPLING[name])
    path = Path(name)
    try:
        is_file, is_folder = path.is_file(), name != "" and path.is_dir()
    except (OSError, ValueError):
        is_file = is_folder = False
    if is_file and path.suffix == ".gguf":
        return _open_gguf_checkpoint(name, path, dummy, seed)
    if is_folder:
        return _open_folder(name, path, dummy, seed)
    if not is_file and re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", name, re.ASCII):
        return _open_folder(name, _download(name, dummy), dummy, seed)
    raise ConfigError(
        f"model is {name[:200]!r}; allowed: a bundled name ({', '.join(BUNDLED)}), a folder with config.json and "
        "safetensors files, a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def _open_folder(name: str, folder: Path, dummy: bool, seed: int) -> Checkpoint:
    configs = read_configs(folder)
    sources = hf_sources(configs[0])
    # Tied models are often saved with the head written out once more.
    ignored = ("lm_head.weight",) if configs[0].tie_embeddings else ()
    tokenizer = folder if (folder / "tokenizer.json").is_file() else None
    store = None if dummy else open_safetensors(folder)
    return Checkpoint(name, configs, store=store, sources=sources, ignored=ignored, tokenizer=tokenizer, seed=seed)


def _open_gguf_checkpoint(
    name: str, path: Path, dummy: bool, seed: int, sampling: Mapping[str, Any] | None = None
) -> Checkpoint:
    # Here, as the package gguf costs start-up time and nothing else needs it.
    from .gguf import open_gguf

    store = open_gguf(path)
    model_config, generation_config = parse_gguf_configs(store.metadata, store)
    return Checkpoint(
        name,
        (model_config, replace(generation_config, **(sampling or {}))),
        store=None if dummy else store,
        sources=gguf_sources(model_config),
        ignored=(ROPE_FACTORS,),
        tokenizer=tokenizer_metadata(store.metadata),
        seed=seed,
    )


def _download(name: str, dummy: bool) -> Path:
    """Fetch a hub model's safetensors, JSON and template files, or find them in the hub's local cache."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja"] + ([] if dummy else ["*.safetensors"])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client lets its transport's own exceptions through
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model is {name!r}, which is no local path and cannot be fetched from the hub: "
            f"{type(error).__name__}: {reason}"
        ) from error
