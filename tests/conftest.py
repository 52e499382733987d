"""What every test shares: the tier that sizes loops, and one thread for torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Tier = Literal["test", "all", "soak"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=("test", "all", "soak"),
        default="test",
        help="test: small counts (minutes); all: the full counts; soak: full counts times ten with fresh seeds",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what belongs to the larger tiers, without counting it as skipped."""
    if config.getoption("--tier") != "test":
        return
    kept = [item for item in items if item.get_closest_marker("full") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session")
def tier(request: pytest.FixtureRequest) -> Tier:
    return request.config.getoption("--tier")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def count(tier: Tier) -> Callable[[int, int], int]:
    """Return `count(small, full)`: how often to repeat something in this tier."""
    return lambda small, full: {"test": small, "all": full, "soak": 10 * full}[tier]
