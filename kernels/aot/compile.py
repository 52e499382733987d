"""This module holds the compilation of variants, in parallel processes and remembered on disk. It does not know what is
wanted of them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import triton

from ... import kernels
from . import sass
from .driver import Launch, fake_driver
from .targets import GPUS, Gpu

__all__ = ["compile_all", "compile_variant", "default_cache", "find_kernel", "hash_kernels"]


def default_cache() -> Path:
    """Return the folder in which results are remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "aot"


@functools.cache
def hash_kernels() -> None:
    """Let Triton hash every kernel, in one order, so that processes that share its cache find each other's results.

    Its hash of a kernel (3.7) counts the constants of a function that it calls only if that function has been hashed
    before: by itself, it would depend on what else a process has compiled.
    """
    for found in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        if found.name.endswith("_triton"):
            for function in vars(importlib.import_module(found.name)).values():
                if isinstance(function, triton.JITFunction):
                    function.cache_key  # noqa: B018


def find_kernel(launch: Launch) -> Any:
    """Return the kernel that a variant is of, hashed as in every other process."""
    hash_kernels()
    return getattr(importlib.import_module(launch.module), launch.kernel)


def _key(launch: Launch) -> str:
    """Return a name that changes with all that the facts depend on: kernel sources, compiler, how we read."""
    kernel = find_kernel(launch)
    reader = Path(sass.__file__).read_bytes()
    parts = (
        triton.__version__,
        launch.target,
        kernel.cache_key,
        launch.specialization,
        hashlib.sha256(reader).hexdigest(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def compile_variant(launch: Launch) -> Any:
    """Compile one variant by the path that a launch takes, on a machine with or without its GPU.

    Returns:
        Triton's compiled kernel, which it also keeps in its cache on disk.
    """
    kernel = find_kernel(launch)
    # Compiling asks a driver for the architecture alone; where there is no such card, all cards of it would do.
    arch = int(launch.target.removeprefix("sm_"))
    with fake_driver(Gpu(arch, launch.target, num_sms=1, shared_bytes=0)):
        return kernel.preload(launch.specialization)


def _facts(launch: Launch) -> dict[str, Any]:
    """Compile one variant and read its machine code."""
    compiled, gpu = compile_variant(launch), GPUS[launch.target]
    metadata = compiled.metadata
    facts = sass.read_cubin(compiled.asm["cubin"])
    return facts | {
        "shared_bytes": metadata.shared,
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "ctas_per_sm": gpu.ctas_per_sm(facts["regs"], metadata.shared, metadata.num_warps),
    }


def compile_all(
    launches: Iterable[Launch], *, cache: Path, num_workers: int
) -> Iterator[tuple[Launch, dict[str, Any]]]:
    """Compile variants and yield each with what its machine code says, as they get ready."""
    cache.mkdir(parents=True, exist_ok=True)
    missing: dict[Launch, Path] = {}
    for launch in launches:
        path = cache / f"{_key(launch)}.json"
        if path.exists():
            yield launch, json.loads(path.read_text(encoding="utf-8"))
        else:
            missing[launch] = path
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(missing)), mp_context=context) as pool:
        waiting = {pool.submit(_facts, launch): launch for launch in missing}
        try:
            for future in as_completed(waiting):
                launch, facts = waiting[future], future.result()
                partial = missing[launch].with_suffix(f".{os.getpid()}")
                partial.write_text(json.dumps(facts), encoding="utf-8")
                partial.replace(missing[launch])
                yield launch, facts
        finally:
            pool.shutdown(cancel_futures=True)
