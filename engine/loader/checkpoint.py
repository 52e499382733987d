"""This module holds `Checkpoint`, one model wherever its files lie, and finds it by name. It does not know modules."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ..config import GenerationConfig, ModelConfig
from ..errors import CheckpointError, ConfigError
from ..footprint import weight_shapes
from .bundled import BUNDLED, BUNDLED_SAMPLING, bundled_path
from .dummy import fill_dummy
from .gguf_config import ROPE_FACTORS, parse_gguf_configs, tokenizer_metadata
from .hf_config import read_configs
from .kv_scales import KV_SCALE, KVScales, read_kv_scales
from .mapping import Source, gguf_sources, hf_sources, match
from .safetensors import open_safetensors
from .store import Entry, TensorStore
from .transfer import Link, pieces_in_order

__all__ = ["Checkpoint", "resolve_model"]

CHUNK_BYTES, LINK_CHUNK_BYTES = 4 << 20, 32 << 20
"""Rows are read in pieces of at most this many bytes of float32 (or one row): what a load holds beside the weights, or
in each buffer of a link."""
FINGERPRINT_BYTES = 256

Allocate = Callable[[str, tuple[int, ...]], torch.Tensor]
OnLoaded = Callable[[str, torch.Tensor], None]
Progress = Callable[[int, int], None]


class _Piece(NamedTuple):
    """Some rows of a source."""

    source: Source
    entry: Entry
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return (self.stop - self.start) * (self.entry.num_bytes // self.entry.shape[0])


class Checkpoint:
    """One model: its configs, where its tokenizer is, and its weights, checked but not read yet.

    Attributes:
        source_name: what the user asked for.
        model_config: the decoder's shape.
        generation_config: how it wants to be sampled.
        tokenizer_folder: the folder of its tokenizer.json, or None.
        tokenizer_metadata: a GGUF file's `tokenizer.*` keys and values, or None.
        shapes: every parameter's name and shape, in the order of the forward pass.
        kv_scales: for keys and values in eight bits, by layer those of k and v; None: it has none.
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
        kv_scales: KVScales | None = None,
        seed: int = 0,
    ) -> None:
        self.kv_scales = kv_scales
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
        own_shapes = {
            name: entry.shape
            for name, entry in store.entries.items()
            if not KV_SCALE.fullmatch(name.removeprefix("model."))
        }
        found = match(sources, own_shapes, file=store.name, ignored=ignored)
        for source in sources:
            entry = store.entries[found[source.name]]
            store.check_loadable(entry)
            self._parts[source.target].append((source, entry))

    @property
    def file_bytes(self) -> int:
        """Bytes of all parameters as the files have them; 0 where weights are random."""
        return sum(entry.num_bytes for parts in self._parts.values() for _, entry in parts)

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

    def load_weights(
        self,
        allocate: Allocate,
        on_loaded: OnLoaded,
        progress: Progress | None = None,
        *,
        link: Link | None = None,
    ) -> None:
        """Read all weights, parameter by parameter in the order of the forward pass.

        No parameter is kept here after `on_loaded`, so that a caller may repack it and let it go.

        Args:
            allocate: gives the tensor for a parameter's name and shape: contiguous, of any floating dtype and device.
            on_loaded: called with the name and the tensor once it is complete.
            progress: called with (bytes done, bytes in all) of the checkpoint.
            link: to the device, where it copies by itself: files are read ahead into the link's buffers, and what is
                wrong with the values shows on the device and is told at the end. None: one piece after the other.

        Raises:
            CheckpointError: a tensor holds NaN or Inf or does not fit the dtype, or a file has changed since.
        """
        pieces = {
            name: [piece for source, entry in parts for piece in self._cut(source, entry, link)]
            for name, parts in self._parts.items()
        }
        in_order = [piece for each in pieces.values() for piece in each]
        total, done = self.file_bytes, 0
        files = dict.fromkeys(piece.entry.file for piece in in_order)
        bounds: list[tuple[_Piece, torch.dtype, torch.Tensor]] = []
        for file in files:
            file.check_unchanged()

        def read(number: int, buffer: torch.Tensor) -> torch.Tensor:
            assert self._store is not None, "a source has a store"
            _, entry, start, stop = in_order[number]
            return self._store.read_rows(entry, start, stop, buffer)

        with closing(pieces_in_order([piece.num_bytes for piece in in_order], read, link)) as chunks:
            for name, shape in self.shapes.items():
                tensor = allocate(name, shape)
                assert tuple(tensor.shape) == shape, f"{name} was allocated as {tuple(tensor.shape)}, not {shape}"
                if self._store is None:
                    fill_dummy(self.model_config, name, tensor, self._seed)
                for piece in pieces[name]:
                    values = _put(tensor, piece, next(chunks), self.model_config.head_dim, link)
                    bounds.append((piece, tensor.dtype, torch.stack(torch.aminmax(values))))
                    if link is None:
                        _check_bounds(*bounds.pop())
                    done += piece.num_bytes
                    if progress is not None:
                        progress(done, total)
                on_loaded(name, tensor)
                del tensor
            left = next(chunks, None)  # and with it the last copies are waited for
            assert left is None, "a piece has been put nowhere"
        for each in bounds:
            _check_bounds(*each)
        for file in files:
            file.check_unchanged()

    def _cut(self, source: Source, entry: Entry, link: Link | None) -> list[_Piece]:
        """Cut a source into pieces that are read at once."""
        rows, row_elements = entry.shape[0], math.prod(entry.shape[1:])
        unit = self.model_config.head_dim if source.layout == "paired" else 1
        step = max(1, (CHUNK_BYTES if link is None else LINK_CHUNK_BYTES) // (4 * row_elements * unit)) * unit
        return [_Piece(source, entry, start, min(start + step, rows)) for start in range(0, rows, step)]


@torch.no_grad()
def _put(tensor: torch.Tensor, piece: _Piece, chunk: torch.Tensor, head_dim: int, link: Link | None) -> torch.Tensor:
    """Copy a piece into its rows of a parameter; return its values as they were read, where they are now."""
    source, _, start, stop = piece
    target = tensor[:, start:stop] if source.layout == "transposed" else tensor[source.row + start : source.row + stop]
    if link is not None:
        is_straight = source.layout == "plain" and target.dtype == chunk.dtype
        there = target if is_straight else torch.empty_like(chunk, device=target.device)
        link.copy(there, chunk)
        if is_straight:
            return target
        chunk = there
    if source.layout == "paired":
        row_elements = math.prod(chunk.shape[1:])
        target = target.view(-1, 2, head_dim // 2, row_elements)
        target.copy_(chunk.view(-1, head_dim // 2, 2, row_elements).transpose(1, 2))
    else:
        target.copy_(chunk.T if source.layout == "transposed" else chunk)
    return chunk


def _check_bounds(piece: _Piece, dtype: torch.dtype, bounds: torch.Tensor) -> None:
    """Refuse a piece by its least and its greatest value: a NaN anywhere makes both NaN."""
    entry, (low, high) = piece.entry, bounds.tolist()
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
    return Checkpoint(
        name,
        configs,
        store=store,
        sources=sources,
        ignored=ignored,
        tokenizer=tokenizer,
        kv_scales=None if store is None else read_kv_scales(store, configs[0].num_layers),
        seed=seed,
    )


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
