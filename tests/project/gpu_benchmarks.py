"""This module holds how tests import benchmarks/, which is no package of ours, and a made-up machine. It does not know
what is tested.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = {"name": "made up", "arch": 90, "num_sms": 1, "memory_bytes": 1, "l2_bytes": 1, "cuda": "0"}
MACHINE = {"packages": {"torch": "2", "triton": "3"}, "gpu": GPU}
IDENTITY = {"source": "abc", "torch": "2", "triton": "3", "gpu": "made up"}
RUN = {"started": "2026-01-02T03:04:05Z", "identity": IDENTITY, "level": "normal", "machine": MACHINE}
RATES = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": 1e14}


def load(*names: str) -> list[ModuleType]:
    """Import modules of benchmarks/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return [importlib.import_module(name) for name in names]
