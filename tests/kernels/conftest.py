"""What the kernel tests share: every backend that can run here, poisoned allocations, an honest interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from octavo.kernels.dispatch import Backend, available_backends, use_backend

from .allocation import poisoned_allocations
from .backends import takes
from .calls import INTERPRETER

if INTERPRETER:
    from .interpreter import install

    install()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `backend` on every backend that can run the ops its module names in OPS (none: all)."""
    named = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not named:
        metafunc.parametrize("backend", available_backends(*getattr(metafunc.module, "OPS", ())), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the pairs of a backend and a case that cannot be, without counting them as skipped."""
    small = config.getoption("--tier") == "test"

    def fits(item: pytest.Item) -> bool:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        return takes(parameters.get("backend", ""), parameters.values(), small=small)

    items[:] = [item for item in items if fits(item)]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with use_backend(request.param), poisoned_allocations():
        yield request.param


@pytest.fixture(scope="session")
def seeds(count: Callable[[int, int], int], seed: int) -> range:
    """Seeds of a test that draws its inputs: few in the small tier."""
    return range(seed, seed + count(1, 3))
