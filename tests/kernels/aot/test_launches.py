"""This module checks how many kernels a step launches in which every sequence decodes, and that a graph could hold the
launches. It does not know what they compute.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import octavo.kernels
import pytest

from .programs import output_of, run_program

MAX_PER_LAYER, MAX_OUTSIDE = 6, 8
NUM_LAYERS = 2


@functools.cache
def launched(config: str, *flags: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(output_of("decode_launches.py", f"--config={config}", *flags))
    return report


def taken_apart(step: list[str]) -> tuple[list[str], list[str]]:
    """Return the launches of one of the two layers, which are to launch the same, and those outside of them.

    A layer begins where it writes its keys and values; the norm before belongs to the layer before, or to none.
    """
    first, second = (i for i, kernel in enumerate(step) if kernel == "_write_kernel")
    layer, size = step[first:second], second - first
    assert step[second : second + size] == layer, f"the layers differ: {step}"
    return layer, step[:first] + step[second + size :]


@pytest.mark.parametrize(
    ("config", "flags"),
    [("llama", ()), ("qwen3, a window in one layer", ()), ("gpt2", ()), ("llama", ("--graphs",))],
)
def test_a_decode_step_launches_few_kernels(config: str, flags: tuple[str, ...]) -> None:
    report = launched(config, *flags)
    assert report["num_late"] == 0
    for kind, steps in report["steps"].items():
        # A step that captures a graph runs what it captures more than once.
        replayed = [step for step in steps if step.count("_write_kernel") == NUM_LAYERS]
        assert replayed == steps or "--graphs" in flags
        assert len(replayed) >= 2, f"{kind}: no step without a prompt"
        for step in replayed:
            layer, outside = taken_apart(step)
            assert len(layer) <= MAX_PER_LAYER, f"{kind}: {len(layer)} launches per layer: {layer}"
            assert len(outside) <= MAX_OUTSIDE, f"{kind}: {len(outside)} launches outside the layers: {outside}"


def test_the_readme_names_the_launches() -> None:
    layer, outside = (
        f"{len(kernels)}: {', '.join(f'`{kernel}`' for kernel in kernels)}"
        for kernels in taken_apart(launched("llama")["steps"]["greedy"][-1])
    )
    readme = " ".join((Path(octavo.kernels.__file__).parent / "README.md").read_text(encoding="utf-8").split())
    assert f"launches per layer {layer}; outside of the layers {outside}." in readme


def test_a_launch_depends_on_shapes_and_promises_alone() -> None:
    """On tensors without data, so that asking for any would fail: a captured launch serves whatever comes later."""
    for num_seqs, num_columns, grids in json.loads(output_of("decode_grids.py")):
        num_splits = num_columns * 64 // 512
        num_items = num_seqs * num_splits  # what the table lets them have
        expected = [
            ["expand_rows_kernel", num_seqs, -(-num_columns // 256)],
            ["_rms_norm_kernel", num_seqs],
            ["_write_kernel", num_seqs, 1 + 4],
            ["plan_decode_kernel", num_seqs],
            ["decode_kernel", min(num_items, 132 * 3 // 8), 8],
            *([["combine_kernel", num_seqs, 32]] if num_splits > 1 else []),
            ["_activation_kernel", num_seqs, 7],
        ]
        assert grids == expected


def test_a_launch_that_asks_for_data_is_found() -> None:
    """The negative control."""
    done = run_program("decode_grids.py", "--planted")
    assert done.returncode == 1
    assert "cdiv_of_data" in done.stderr
