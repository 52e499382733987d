"""This module holds what every test shares: the tier that sizes loops, seeds, one thread. It does not know any test."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Literal

import pytest

try:
    import hypothesis
except ImportError:  # a machine with a GPU brings torch, numpy and pytest; tests that draw examples do not run there
    hypothesis = None  # type: ignore[assignment]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists("/dev/nvidiactl"):
    # Before anything imports Triton: where there is no GPU its interpreter runs the kernels, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

Tier = Literal["test", "all", "soak"]
SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=("test", "all", "soak"),
        default="test",
        help="test: small counts (minutes); all: the full counts; soak: full counts times ten with fresh seeds",
    )
    parser.addoption("--seed", type=int, help="where random numbers start, to repeat a run of the soak tier")


def pytest_configure(config: pytest.Config) -> None:
    """Size Hypothesis by the tier: the same examples every time, except when soaking."""
    tier, seed = config.getoption("--tier"), config.getoption("--seed")
    config.stash[SEED] = seed if seed is not None else secrets.randbits(31) if tier == "soak" else 0
    if hypothesis is None:
        return
    max_examples = {"test": 50, "all": 300, "soak": 3000}[tier]
    # No deadline: beside other load one example may take many times as long as the last.
    hypothesis.settings.register_profile(tier, max_examples=max_examples, derandomize=tier != "soak", deadline=None)
    hypothesis.settings.load_profile(tier)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"tier {config.getoption('--tier')}, seed {config.stash[SEED]}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what belongs to the larger tiers, without counting it as skipped."""
    if config.getoption("--tier") != "test":
        return
    kept = [item for item in items if item.get_closest_marker("full") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def tier(request: pytest.FixtureRequest) -> Tier:
    return request.config.getoption("--tier")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def count(tier: Tier) -> Callable[[int, int], int]:
    """Return `count(small, full)`: how often to repeat something in this tier."""
    return lambda small, full: {"test": small, "all": full, "soak": 10 * full}[tier]


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """Return where random numbers start: 0, when soaking a fresh number, or what `--seed` says."""
    return request.config.stash[SEED]
