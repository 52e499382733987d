"""This module says what machine this is, as JSON. It does not know what will be run on it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

__all__ = ["probe"]

PACKAGES = ("torch", "triton", "numpy", "pytest", "transformers", "flashinfer-python", "vllm", "sglang")


def version(package: str) -> str | None:
    """Return a package's version, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> dict[str, Any] | None:
    """Return what torch says of the first GPU, or None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "arch": properties.major * 10 + properties.minor,
        "num_sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }


def probe() -> dict[str, Any]:
    """Return the machine: its GPU and the versions that results depend on."""
    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "gpu": gpu(),
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
