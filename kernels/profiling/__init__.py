"""This package holds Triton's own profiler, Proton, which knows every kernel by its name. It does not know engines.

None of this has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["proton_session"]


@contextmanager
def proton_session(file: Path) -> Iterator[None]:
    """Profile every kernel that runs until the end of the `with` statement.

    Args:
        file: to write, a tree of kernels with their times; Proton puts .hatchet after its name where that is missing.
    """
    import triton.profiler as proton

    session = proton.start(str(file).removesuffix(".hatchet"), hook="triton")
    try:
        yield
    finally:
        proton.finalize(session)
