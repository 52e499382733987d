"""What the kernel tests share: every backend that can run here, and poisoned allocations."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from octavo.kernels.dispatch import Backend, available_backends, use_backend

from .allocation import poisoned_allocations
from .calls import INTERPRETER

if INTERPRETER:
    from .interpreter import install

    install()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `backend` on every backend that can run the ops its module names in OPS (none: all)."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available_backends(*getattr(metafunc.module, "OPS", ())), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with use_backend(request.param), poisoned_allocations():
        yield request.param


@pytest.fixture(scope="session")
def seeds(count: Callable[[int, int], int], seed: int) -> range:
    """Seeds of a test that draws its inputs: few in the small tier."""
    return range(seed, seed + count(1, 3))
