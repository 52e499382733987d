"""Damaged and hostile safetensors folders are refused by name, and nothing else happens."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.engine.errors import CheckpointError
from octavo.engine.loader import resolve_model

Tensors = dict[str, np.ndarray]
Header = dict[str, Any]
Write = Callable[..., Path]
Load = Callable[..., dict[str, torch.Tensor]]
NORM, Q_PROJ = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def edit(name: str, **fields: Any) -> Callable[[Header, bytes], tuple[Header, bytes]]:
    def change(header: Header, data: bytes) -> tuple[Header, bytes]:
        header[name] |= fields
        return header, data

    return change


def move(name: str, begin: int, end: int) -> Callable[[Header, bytes], tuple[Header, bytes]]:
    def change(header: Header, data: bytes) -> tuple[Header, bytes]:
        old = header[name]["data_offsets"]
        header[name]["data_offsets"] = [old[0] + begin, old[1] + end]
        return header, data

    return change


def twice(header: Header, data: bytes) -> tuple[bytes, bytes]:
    raw = json.dumps(header)
    return (raw[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}').encode(), data


def hole(header: Header, data: bytes) -> tuple[Header, bytes]:
    """Leave eight unused bytes in front of every tensor but the first."""
    first = min(header.values(), key=lambda entry: entry["data_offsets"][0])
    at = first["data_offsets"][1]
    for entry in header.values():
        if entry is not first:
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return header, data[:at] + b"\0" * 8 + data[at:]


BAD_TABLES: dict[str, tuple[Callable[[Header, bytes], tuple[Any, bytes]], str]] = {
    "truncated": (lambda header, data: (header, data[:-1]), "lie outside"),
    "longer than its table": (lambda header, data: (header, data + b"\0"), "where its table says"),
    "overlap": (move(Q_PROJ, -4, -4), "overlaps"),
    "hole": (hole, "leaves a hole"),
    "begin after end": (edit(NORM, data_offsets=[8, 4]), "lie outside"),
    "negative offset": (edit(NORM, data_offsets=[-4, 124]), "not two byte positions"),
    "offset of 2**64": (edit(NORM, data_offsets=[2**64, 2**64 + 128]), "lie outside"),
    "offset is a float": (edit(NORM, data_offsets=[0.0, 128.0]), "not two byte positions"),
    "offset is true": (edit(NORM, data_offsets=[False, 128]), "not two byte positions"),
    "three offsets": (edit(NORM, data_offsets=[0, 64, 128]), "not two byte positions"),
    "bytes and shape differ": (edit(NORM, shape=[31]), "needs 124"),
    "shape [0, 2**40]": (edit(NORM, shape=[0, 2**40]), "positive sizes"),
    "product of sizes over 2**64": (edit(NORM, shape=[2**40, 2**40]), "needs"),
    "size of 2**63": (edit(NORM, shape=[2**63]), "positive sizes"),
    "negative size": (edit(NORM, shape=[-32]), "positive sizes"),
    "size is true": (edit(NORM, shape=[True, 32]), "positive sizes"),
    "nine dimensions": (edit(NORM, shape=[1] * 8 + [32]), "positive sizes"),
    "unknown dtype": (edit(NORM, dtype="F31"), "dtype 'F31'"),
    "dtype is a list": (edit(NORM, dtype=["F32"]), "dtype"),
    "integer weights": (edit(NORM, dtype="I32"), "has dtype I32"),
    "wrong shape": (edit(NORM, shape=[4, 8]), "the config says [32]"),
    "an unknown field": (edit(NORM, strides=[1]), "nothing else"),
    "an entry that is no object": (lambda header, data: (header | {NORM: 3}, data), "nothing else"),
    "the same key twice": (twice, "appears twice"),
    "metadata that is no object": (lambda header, data: (header | {"__metadata__": [1]}, data), "__metadata__"),
    "metadata that is no text": (lambda header, data: (header | {"__metadata__": {"a": 1}}, data), "__metadata__"),
    "header is a list": (lambda _, data: (b"[]", data), "JSON object"),
    "header is no JSON": (lambda _, data: (b"{'a': 1}", data), "not valid JSON"),
    "header is not UTF-8": (lambda _, data: (b'{"\xff": 1}', data), "not valid JSON"),
    "header with NaN": (lambda _, data: (b'{"a": NaN}', data), "not valid JSON"),
    "header nested deeply": (lambda _, data: (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", data), "not valid"),
    "an integer of 5,000 digits": (lambda _, data: (b'{"a": ' + b"9" * 5000 + b"}", data), "not valid JSON"),
}


@pytest.mark.parametrize("fault", BAD_TABLES)
def test_a_bad_table_is_refused(fault: str, write_folder: Write, tensors: Tensors) -> None:
    change, message = BAD_TABLES[fault]
    folder = write_folder(tensors, change)
    with pytest.raises(CheckpointError) as caught:
        resolve_model(str(folder))
    assert message in str(caught.value)
    assert caught.value.file == "model.safetensors"


@pytest.mark.parametrize("head", [b"", b"\1\0\0", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}"])
def test_a_header_that_cannot_fit_is_refused(head: bytes, write_folder: Write, tensors: Tensors) -> None:
    folder = write_folder(tensors)
    (folder / "model.safetensors").write_bytes(head)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        resolve_model(str(folder))


def test_the_good_folder_loads(write_folder: Write, tensors: Tensors, load: Load) -> None:
    params = load(resolve_model(str(write_folder(tensors))))
    assert torch.equal(params["final_norm.weight"], torch.from_numpy(tensors[NORM]))


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {new if name == old else name: value for name, value in tensors.items()}


BAD_SETS: dict[str, tuple[Callable[[Tensors], Tensors], str, str]] = {
    "missing": (lambda t: {n: v for n, v in t.items() if n != Q_PROJ}, "is missing", Q_PROJ.removeprefix("model.")),
    "unexpected": (lambda t: t | {"model.extra": t[NORM]}, "not a tensor of this model", "model.extra"),
    "a layer too many": (
        lambda t: t | {Q_PROJ.replace("1", "2", 1): t[Q_PROJ]},
        "not a tensor of this model",
        Q_PROJ.replace("1", "2", 1),
    ),
    "renamed": (lambda t: renamed(t, NORM, "model.norm.weights"), "not a tensor of this model", "model.norm.weights"),
    "with and without prefix": (lambda t: t | {"norm.weight": t[NORM]}, "is there twice", "norm.weight"),
    "transposed": (
        lambda t: t | {"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T.copy()},
        "has shape [32, 40]",
        "model.layers.0.mlp.up_proj.weight",
    ),
    "a bias nobody asked for": (
        lambda t: t | {Q_PROJ.replace("weight", "bias"): t[NORM]},
        "not a tensor of this model",
        Q_PROJ.replace("weight", "bias"),
    ),
}


@pytest.mark.parametrize("fault", BAD_SETS)
def test_the_set_of_tensors_must_be_exact(fault: str, write_folder: Write, tensors: Tensors) -> None:
    change, message, tensor = BAD_SETS[fault]
    with pytest.raises(CheckpointError) as caught:
        resolve_model(str(write_folder(change(tensors))))
    assert message in str(caught.value)
    assert caught.value.tensor == tensor


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, -1])
def test_weights_that_are_not_finite_are_refused_by_name(
    value: float, at: int, write_folder: Write, tensors: Tensors, load: Load
) -> None:
    tensors[Q_PROJ].ravel()[at] = value
    checkpoint = resolve_model(str(write_folder(tensors)))
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        load(checkpoint)
    assert caught.value.tensor == Q_PROJ


def test_weights_that_do_not_fit_the_dtype_are_refused_by_name(
    write_folder: Write, tensors: Tensors, load: Load
) -> None:
    tensors[Q_PROJ][3, 3] = -70000.0
    checkpoint = resolve_model(str(write_folder(tensors)))
    assert load(checkpoint, torch.bfloat16)["layers.1.qkv.weight"][3, 3] == -70144.0
    with pytest.raises(CheckpointError, match=r"holds 7e\+04; float16 ends at 6.55e\+04") as caught:
        load(checkpoint, torch.float16)
    assert caught.value.tensor == Q_PROJ


@pytest.mark.parametrize("num_bytes", [0, 100, -1])
def test_a_file_shortened_after_the_check_is_an_error(
    num_bytes: int, write_folder: Write, tensors: Tensors, load: Load
) -> None:
    folder = write_folder(tensors)
    file = folder / "model.safetensors"
    checkpoint = resolve_model(str(folder))
    os.truncate(file, num_bytes if num_bytes >= 0 else file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="bytes when it was checked"):
        load(checkpoint)


def test_a_file_shortened_while_it_is_read_is_an_error(write_folder: Write, tensors: Tensors) -> None:
    folder = write_folder(tensors)
    checkpoint = resolve_model(str(folder))

    def allocate(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == "layers.1.qkv.weight":
            os.truncate(folder / "model.safetensors", 4000)
        return torch.empty(shape)

    with pytest.raises(CheckpointError, match="too early") as caught:
        checkpoint.load_weights(allocate, lambda name, tensor: None)
    assert caught.value.tensor == Q_PROJ


def test_a_file_written_to_while_it_is_read_is_an_error(write_folder: Write, tensors: Tensors) -> None:
    folder = write_folder(tensors)
    checkpoint = resolve_model(str(folder))

    def touch(name: str, tensor: torch.Tensor) -> None:
        os.utime(folder / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="written to"):
        checkpoint.load_weights(lambda name, shape: torch.empty(shape), touch)


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    names = sorted(tensors)
    return {name: tensors[name] for name in names[:9]}, {name: tensors[name] for name in names[9:]}


def test_shards_and_their_index(write_shards: Write, tensors: Tensors, load: Load) -> None:
    one, two = halves(tensors)
    params = load(resolve_model(str(write_shards({"a.safetensors": one, "b.safetensors": two}))))
    assert torch.equal(params["lm_head.weight"], torch.from_numpy(tensors["lm_head.weight"]))


def test_the_same_tensor_in_two_shards_is_refused(write_shards: Write, tensors: Tensors) -> None:
    one, two = halves(tensors)
    name = next(iter(one))
    shards = {"a.safetensors": one, "b.safetensors": two | {name: one[name]}}
    for listed in shards:
        weight_map = {key: file for file, part in shards.items() for key in part} | {name: listed}
        with pytest.raises(CheckpointError, match=f"has it in '{listed}'") as caught:
            resolve_model(str(write_shards(shards, weight_map)))
        assert caught.value.tensor == name


def test_an_index_that_disagrees_with_its_shards_is_refused(write_shards: Write, tensors: Tensors) -> None:
    one, two = halves(tensors)
    shards = {"a.safetensors": one, "b.safetensors": two}
    good = {name: file for file, part in shards.items() for name in part}
    name = next(iter(one))
    cases: list[tuple[Mapping[str, Any], str]] = [
        ({key: file for key, file in good.items() if key != name}, "has it in 'no file'"),
        (good | {"model.extra": "a.safetensors"}, "not there"),
        (good | {name: "b.safetensors"}, "has it in 'b.safetensors'"),
        (good | {"model.extra": "c.safetensors"}, "cannot be opened"),
    ]
    for weight_map, message in cases:
        with pytest.raises(CheckpointError, match=message):
            resolve_model(str(write_shards(shards, weight_map)))


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": null}}',
        b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        b'{"weight_map": {"a": "pytorch_model.bin"}}',
        b'{"weight_map": {"a": "\\ud800.safetensors"}}',
        b'{"weight_map": {"a": "x\\u0000.safetensors"}}',
        b'{"weight_map": {"a": "' + b"x" * 5000 + b'.safetensors"}}',
        b'{"weight_map": {"a": "' + b"\xff" + b'.safetensors"}}',
    ],
)
def test_a_bad_index_is_refused(index: bytes, write_shards: Write) -> None:
    with pytest.raises(CheckpointError):
        resolve_model(str(write_shards({}, index)))


@pytest.mark.parametrize("way", ["parent", "absolute", "backslash", "folder", "dots", "symlink", "relative symlink"])
def test_an_index_cannot_leave_its_folder(
    way: str, write_shards: Write, tensors: Tensors, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_shards({"a.safetensors": tensors})
    outside = tmp_path_factory.mktemp("outside") / "a.safetensors"
    (folder / "a.safetensors").rename(outside)
    back = os.path.relpath(outside, folder)
    name = {
        "parent": back,
        "absolute": str(outside),
        "backslash": back.replace("/", "\\"),
        "folder": "inner/a.safetensors",
        "dots": "..",
    }.get(way, "a.safetensors")
    if way.endswith("symlink"):
        (folder / "a.safetensors").symlink_to(outside if way == "symlink" else back)
    write_shards({}, dict.fromkeys(tensors, name))
    message = {"dots": "not a .safetensors file"}.get(way, "leaves the" if "symlink" in way else "not a plain name")
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(folder))


def test_a_link_inside_the_folder_or_into_the_hubs_cache_is_followed(
    write_shards: Write, write_folder: Write, tensors: Tensors, load: Load, tmp_path: Path
) -> None:
    folder = write_shards({"a.safetensors": tensors})
    (folder / "a.safetensors").rename(folder / "real")
    (folder / "a.safetensors").symlink_to("real")
    assert load(resolve_model(str(folder)))
    snapshot, blobs = tmp_path / "snapshots" / "0123abcd", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / "real").rename(blobs / "weights")
    (folder / "config.json").rename(blobs / "config")
    (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
    (snapshot / "config.json").symlink_to("../../blobs/config")
    assert load(resolve_model(str(snapshot)))
    (blobs / "weights").rename(tmp_path / "weights")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../weights")
    with pytest.raises(CheckpointError, match="leaves the"):
        resolve_model(str(snapshot))


def test_what_is_no_regular_file_is_refused(write_folder: Write, tensors: Tensors) -> None:
    folder = write_folder(tensors)
    file = folder / "model.safetensors"
    file.unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        resolve_model(str(folder))
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="not a regular file"):
        resolve_model(str(folder))
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        resolve_model(str(folder))
    file.rmdir()
    file.symlink_to(file)
    with pytest.raises(CheckpointError):
        resolve_model(str(folder))


def test_flipped_bytes_give_a_checkpoint_error_or_weights(
    write_folder: Write, tensors: Tensors, load: Load, count: Callable[[int, int], int], seed: int
) -> None:
    folder = write_folder(tensors)
    file = folder / "model.safetensors"
    good = file.read_bytes()
    head_bytes = 8 + int.from_bytes(good[:8], "little")
    rng = np.random.default_rng(seed)
    refused = trials = count(60, 3000)
    for _ in range(trials):
        raw = bytearray(good)
        for at in rng.integers(0, head_bytes, rng.integers(1, 4)):
            raw[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(raw)
        try:
            load(resolve_model(str(folder)))
            refused -= 1
        except CheckpointError:
            pass
    assert refused > 0.9 * trials
