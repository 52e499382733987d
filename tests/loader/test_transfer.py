"""This module holds loading over a link: what is read ahead, when a buffer is used again, how bad values are told. It
does not know CUDA.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from octavo.engine.errors import CheckpointError
from octavo.engine.loader import Checkpoint, checkpoint, resolve_model
from octavo.engine.loader.safetensors import SafetensorsStore
from octavo.engine.loader.transfer import NUM_BUFFERS, NUM_READERS, CudaLink, Link, Mark

from . import test_gguf
from .test_hugging_face import FAMILIES, save

Tensors = dict[str, np.ndarray]
Write = Callable[..., Path]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


class Until:
    """Where a late link's copies end."""

    def __init__(self, link: LateLink, number: int) -> None:
        self._link, self._number = link, number

    def synchronize(self) -> None:
        self._link.finish(self._number)


class LateLink:
    """A link that looks whether a copy could still have read, when it was waited for, what it was to copy."""

    def __init__(self) -> None:
        self.num_buffers = self.num_bytes = self.num_spoilt = 0
        self._begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_finished = 0
        self._lock = threading.Lock()

    def buffer(self, num_bytes: int) -> torch.Tensor:
        self.num_buffers, self.num_bytes = self.num_buffers + 1, num_bytes
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)
        with self._lock:
            self._begun.append((source, source.clone()))

    def mark(self) -> Mark:
        return Until(self, len(self._begun))

    def finish(self, number: int) -> None:
        with self._lock:
            for source, copied in self._begun[self._num_finished : number]:
                self.num_spoilt += not torch.equal(source.view(torch.uint8), copied.view(torch.uint8))
            self._num_finished = max(self._num_finished, number)

    @property
    def num_unfinished(self) -> int:
        return len(self._begun) - self._num_finished


class HastyLink(LateLink):
    """A link whose marks are not waited for."""

    def mark(self) -> Mark:
        return Until(self, 0)


def load(model: Checkpoint, link: Link | None, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    model.load_weights(lambda _name, shape: torch.full(shape, float("nan"), dtype=dtype), found.__setitem__, link=link)
    return found


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LINK_CHUNK_BYTES", 512)


def check(folder: Path, dtype: torch.dtype) -> None:
    model, link = resolve_model(str(folder)), LateLink()
    expected, found = load(model, None, dtype), load(model, link, dtype)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    assert (link.num_buffers, link.num_spoilt, link.num_unfinished) == (NUM_BUFFERS, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama with biases", "gpt2"])
def test_a_link_brings_the_same_weights(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(FAMILIES[family](), tmp_path)
    check(tmp_path, dtype)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_a_link_brings_the_same_weights_of_a_gguf_file(kind: Kind, tmp_path: Path) -> None:
    test_gguf.write(tmp_path / "model.gguf", test_gguf.weights(), kind=kind)
    check(tmp_path / "model.gguf", torch.float32)


def test_a_buffer_is_not_used_again_before_its_copy_is_done(write_folder: Write, tensors: Tensors) -> None:
    """The negative control of the tests above: copies that are not waited for find other bytes."""
    link = HastyLink()
    load(resolve_model(str(write_folder(tensors))), link)
    link.finish(link.num_unfinished)
    assert link.num_spoilt > 0


def test_buffers_are_as_large_as_a_piece_and_no_larger(write_folder: Write, tensors: Tensors) -> None:
    link = LateLink()
    load(resolve_model(str(write_folder(tensors))), link)
    assert link.num_bytes == 512


def test_several_threads_read_at_once(write_folder: Write, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the first readers waits until all of them read."""
    together, read_rows, numbers = threading.Barrier(NUM_READERS), SafetensorsStore.read_rows, iter(range(10**6))

    def waiting(*args: Any) -> torch.Tensor:
        if next(numbers) < NUM_READERS:
            together.wait(timeout=60)
        return read_rows(*args)

    monkeypatch.setattr(SafetensorsStore, "read_rows", waiting)
    assert load(resolve_model(str(write_folder(tensors))), LateLink())
    assert next(numbers) > 2 * NUM_BUFFERS


def reading_threads() -> list[threading.Thread]:
    gc.collect()
    return [each for each in threading.enumerate() if each.name.startswith("octavo-weights")]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(value: float, write_folder: Write, tensors: Tensors) -> None:
    tensors[Q_PROJ].ravel()[-1] = value
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        load(resolve_model(str(write_folder(tensors))), LateLink())
    assert caught.value.tensor == Q_PROJ


def test_values_that_do_not_fit_the_dtype_are_refused_by_name(write_folder: Write, tensors: Tensors) -> None:
    tensors[Q_PROJ][3, 3] = -70000.0
    with pytest.raises(CheckpointError, match=r"holds 7e\+04; float16 ends at 6.55e\+04") as caught:
        load(resolve_model(str(write_folder(tensors))), LateLink(), torch.float16)
    assert caught.value.tensor == Q_PROJ


def test_what_goes_wrong_in_a_thread_ends_the_loading(write_folder: Write, tensors: Tensors) -> None:
    folder = write_folder(tensors)
    model = resolve_model(str(folder))

    def allocate(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == "layers.0.qkv.weight":
            os.truncate(folder / "model.safetensors", 4000)
        return torch.empty(shape)

    with pytest.raises(CheckpointError, match="too early"):
        model.load_weights(allocate, lambda name, tensor: None, link=LateLink())
    assert not reading_threads()


def test_what_goes_wrong_beside_the_threads_ends_them(write_folder: Write, tensors: Tensors) -> None:
    model = resolve_model(str(write_folder(tensors)))

    def allocate(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == "layers.0.qkv.weight":
            raise MemoryError("no room")
        return torch.empty(shape)

    with pytest.raises(MemoryError, match="no room"):
        model.load_weights(allocate, lambda name, tensor: None, link=LateLink())
    assert not reading_threads()


def test_random_weights_need_no_buffers(write_folder: Write, tensors: Tensors) -> None:
    link = LateLink()
    found = load(resolve_model(str(write_folder(tensors)), load_format="dummy"), link)
    assert link.num_buffers == 0
    assert not any(each.isnan().any() for each in found.values())


def test_the_calls_of_cuda(write_folder: Write, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that can be without it: buffers are asked for page-locked, and events recorded and waited for."""
    told: list[str] = []

    class Event:
        def record(self) -> None:
            told.append("record")

        def synchronize(self) -> None:
            told.append("synchronize")

    empty = torch.empty

    def without_pages(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        told.extend(["pin"] * pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", without_pages)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    model = resolve_model(str(write_folder(tensors)))
    found, expected = load(model, CudaLink()), load(model, None)
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    assert told.count("pin") == NUM_BUFFERS
    assert told.count("synchronize") == told.count("record") - NUM_BUFFERS > NUM_BUFFERS
