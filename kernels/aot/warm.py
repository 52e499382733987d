"""This module holds the warm-up: every variant that an engine can launch is compiled and loaded before it serves. It
does not know what an engine is.

The variants are listed by launchers that launch nothing (`keys`), so no tensor is needed and no device waited for. The
first one that no earlier run has compiled sends all others to processes of their own, which fill Triton's cache on
disk; this process then loads them from there. What such a process does not get done is compiled here, and fails here.

None of this has run on a GPU yet. Tests without one show that the set is what random engine runs launch, that launches
find what was loaded, and that this process finds what others have compiled; loading modules on a device is untried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Final, NamedTuple

import torch
from triton import knobs

from ..common.compiled import COMPILED
from ..common.launch import target
from .calls import Settings
from .compile import find_kernel
from .driver import Launch
from .keys import list_variants
from .targets import Gpu, Model
from .workers import compile_in_workers

__all__ = ["MAX_WORKERS", "Warmed", "warm_up"]

MAX_WORKERS: Final = 8
"""Processes that compile at once: each takes a core, and the memory of torch and Triton."""


class Warmed(NamedTuple):
    """What a warm-up has done."""

    num_variants: int
    num_compiled: int
    """Of these, what was not in Triton's cache from an earlier run."""


def warm_up(
    models: Sequence[Model],
    settings: Settings,
    *,
    device: torch.device,
    on_progress: Callable[[int, int], object] = lambda _done, _total: None,
    num_workers: int | None = None,
) -> Warmed:
    """Compile and load what engines of these settings launch; what is compiled from then on is counted as late.

    Nothing else in this process may launch a kernel meanwhile: while variants are listed, launches are only recorded.

    Args:
        models: one, or several where layers differ in what kernels are compiled for.
        device: what the engine runs on.
        on_progress: called with (variants ready, variants in all).
        num_workers: processes that compile; None: one for each core, at most `MAX_WORKERS`.

    Raises:
        ValueError: a kernel does not take the model or the settings.
    """
    COMPILED.mark_cold()
    launches = list(dict.fromkeys(v.launch for model in models for v in list_variants(model, [settings], _gpu(device))))
    if num_workers is None:
        num_workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    num_ready = num_compiled = 0
    for launch in launches:
        num_compiled += _load(launch)
        num_ready += 1
        on_progress(num_ready, len(launches))
        if num_compiled:
            break
    rest = launches[num_ready:]
    with closing(compile_in_workers(rest, num_workers)) as answers:
        for was_compiled in answers:
            num_compiled += was_compiled
            num_ready += 1
            on_progress(num_ready, len(launches))
    num_compiled += sum(map(_load, rest))
    COMPILED.mark_warm()
    return Warmed(len(launches), num_compiled)


def _gpu(device: torch.device) -> Gpu:
    """Return what launchers ask of the GPU that is there, known by name or not."""
    found = target(device)
    return Gpu(found.arch, str(device), found.num_sms, found.shared_bytes + 1024)


def _load(launch: Launch) -> bool:
    """Load a variant where its launch will look for it; return whether it had to be compiled."""
    missing = []

    def listener(*, cache_hit: bool, **event: Any) -> None:
        missing.append(not cache_hit)
        if following is not None:
            following(cache_hit=cache_hit, **event)

    kernel = find_kernel(launch)
    following, knobs.compilation.listener = knobs.compilation.listener, listener
    try:
        compiled = kernel.preload(launch.specialization)
    finally:
        knobs.compilation.listener = following
    # Else the first launch would load the module, and loading one may wait for all that the device is doing.
    compiled._init_handles()
    return any(missing)
