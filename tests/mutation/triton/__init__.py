"""This package holds the bugs to plant in the Triton kernels, one module each. It does not know what catches them.

Each module has `PATCHES`: replacements in the source of one kernel's file.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Patch"]


@dataclass(frozen=True, slots=True)
class Patch:
    """One bug as one replacement in a source file."""

    name: str
    meaning: str
    """What the kernel then does wrong."""
    module: str
    """Relative to `octavo.kernels`, as in `OPS`: ".attention.decode_triton"."""
    old: str
    """Found exactly once in the module's source."""
    new: str
