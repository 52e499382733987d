"""This module holds what the machine has: processor, memory, disk, limits, a free port, a GPU and its driver. It does
not know what is run on it.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...hardware import MIN_CAPABILITY, available_memory_bytes, num_cores
from .finding import Finding, Status

__all__ = ["look_at_gpu", "look_at_limits", "look_at_machine"]

MACHINE, LIMITS, GPU = "Machine", "Surroundings", "GPU"
GIB = 2**30
LOW_MEMORY_BYTES = 2 * GIB
LOW_DISK_BYTES = 5 * GIB
MIN_FILES = 4096
"""A server with a thousand streams has as many connections, and some files besides."""
DRIVER = Path("/dev/nvidiactl")
SMI_S = 20.0


def look_at_machine() -> Iterator[Finding]:
    """Look at processor, memory and disk."""
    import torch

    name, features = _cpu()
    text = f"{name}, cores: {num_cores()}, threads that torch uses: {torch.get_num_threads()}"
    yield Finding(MACHINE, "cpu", Status.OK, text)
    if platform.machine() in ("x86_64", "AMD64"):
        words = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}
        have = [word for flag, word in words.items() if flag in features]
        status = Status.OK if "avx2" in features else Status.WARN
        units = bool({"avx512_bf16", "amx_bf16"} & features)
        text = f"{', '.join(have)}; " if have else "no AVX2, so slow; "
        text += "bfloat16 in hardware" if units else "no bfloat16 in hardware: stay with float32, the default"
        yield Finding(MACHINE, "cpu features", status, text)
    free = available_memory_bytes()
    status = Status.OK if free >= LOW_MEMORY_BYTES else Status.WARN
    fix = "" if status == Status.OK else "end other programs, or take a small model with --kv-cache-tokens 4096"
    yield Finding(MACHINE, "memory", status, f"{free / GIB:,.1f} GiB can be taken", fix)
    free = shutil.disk_usage(_nearest(Path(os.environ.get("HF_HOME") or Path.home()))).free
    status = Status.OK if free >= LOW_DISK_BYTES else Status.WARN
    fix = "" if status == Status.OK else "HF_HOME=/a/larger/disk puts downloaded models elsewhere"
    yield Finding(MACHINE, "disk", status, f"{free / GIB:,.1f} GiB free where models are downloaded to", fix)


def look_at_limits(port: int) -> Iterator[Finding]:
    """Look at what the shell and the system allow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    status = Status.OK if hard == resource.RLIM_INFINITY or hard >= MIN_FILES else Status.WARN
    fix = "" if status == Status.OK else f"ulimit -Hn {MIN_FILES} (as root), or LimitNOFILE={MIN_FILES} in the service"
    files = f"{soft:,} now, a server may raise it to {'any number' if hard == resource.RLIM_INFINITY else f'{hard:,}'}"
    yield Finding(LIMITS, "open files", status, files, fix)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            yield Finding(LIMITS, "port", Status.OK, f"{port} is free")
        except OSError as error:
            fix = "octavo serve --port 0 takes any that is free"
            yield Finding(LIMITS, "port", Status.WARN, f"{port} cannot be taken: {error.strerror}", fix)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        text = "set: Triton kernels run in the interpreter, on the CPU and very slowly"
        yield Finding(LIMITS, "TRITON_INTERPRET", Status.WARN, text, "unset TRITON_INTERPRET")
    yield _triton_cache()


def look_at_gpu() -> Iterator[Finding]:
    """Look at GPUs, their driver, and whether torch was built for them."""
    import torch

    driver = _driver()
    built_for = torch.version.cuda
    if not torch.cuda.is_available():
        version = f" {driver[0]}" if driver else ""
        if not DRIVER.exists():
            yield Finding(GPU, "gpu", Status.OK, "none: octavo runs on the CPU, with the torch backend")
        elif built_for is None:
            text = f"there is a driver{version}, and torch {torch.__version__} is a build without CUDA"
            fix = "pip install --force-reinstall torch --index-url https://pypi.org/simple"
            yield Finding(GPU, "torch", Status.FAIL, text, fix)
        else:
            text = f"a driver{version} is there, and torch, built for CUDA {built_for}, sees no GPU"
            fix = "nvidia-smi says more; the driver must take the CUDA version that torch was built for"
            yield Finding(GPU, "gpu", Status.FAIL, text, fix)
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        capability = (facts.major, facts.minor)
        free, total = torch.cuda.mem_get_info(i)
        good = capability >= MIN_CAPABILITY
        text = f"{facts.name}, capability {facts.major}.{facts.minor}, {free / GIB:,.1f} of {total / GIB:,.1f} GiB free"
        fix = "" if good else "the kernels need 8.0 (Ampere) or newer: octavo runs on the CPU here"
        yield Finding(GPU, f"gpu {i}", Status.OK if good else Status.WARN, text, fix)
    if driver and built_for:
        good = int(driver[1].partition(".")[0]) >= int(built_for.partition(".")[0])
        text = f"{driver[0]}, takes CUDA up to {driver[1]}; torch was built for {built_for}"
        fix = "" if good else "a newer driver, or a torch built for an older CUDA"
        yield Finding(GPU, "driver", Status.OK if good else Status.WARN, text, fix)


def _cpu() -> tuple[str, set[str]]:
    """Return the processor's name and what it says of itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), set()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (name[1] if name else platform.machine()), set(flags[1].split() if flags else ())


def _triton_cache() -> Finding:
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            return Finding(LIMITS, "Triton cache", Status.OK, f"{folder} can be written")
    except OSError as error:
        fix = "TRITON_CACHE_DIR=/a/folder/of/yours"
        return Finding(LIMITS, "Triton cache", Status.WARN, f"{folder}: {error.strerror}", fix)


def _nearest(folder: Path) -> Path:
    """Return the nearest folder that is there: it, or one that it would be in."""
    return next(each for each in (folder, *folder.parents) if os.path.exists(each))  # where nobody may look, it is not


def _driver() -> tuple[str, str] | tuple[()]:
    """Return the driver's version and the newest CUDA version that it takes, as nvidia-smi has them."""
    try:
        text = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=SMI_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    version = re.search(r"Driver Version:\s*([\d.]+)", text)
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*([\d.]+)", text)
    return (version[1], cuda[1]) if version and cuda else ()
