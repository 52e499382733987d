"""This module holds how much the kernels do in one round of their main loop. It does not know how they do it.

Over the instructions that one warp issues for it, this is the efficiency that a kernel can have at best, and it needs
no GPU: an H100 issues four warp-instructions per clock and multiprocessor, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .driver import Launch

__all__ = ["Work", "work"]

_BYTES: Final = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1}


class Work(NamedTuple):
    """What one program does in one round of its main loop, or altogether where it has no loop."""

    flop: int | None = None
    """Floating-point operations of its matrix products, masked ones included."""
    bytes: int | None = None
    """Bytes that it reads and writes of the tensors that grow with the batch or the context."""


class _Variant:
    """A variant's constants and the sizes of its tensors' elements."""

    def __init__(self, launch: Launch) -> None:
        self._constants, self._signature = launch.constants, launch.signature

    def __getitem__(self, constant: str) -> int:
        value: int = self._constants[constant]
        return value

    @property
    def cached(self) -> int:
        """Bytes of an element of the cache; two of a quantised one are read as one number."""
        kind = self._signature["p_k_cache"].removesuffix(":16")
        return 1 if kind in ("*i16", "*u16") else self.itemsize("p_k_cache")

    def itemsize(self, pointer: str) -> int:
        """Return the bytes of an element, 0 where the tensor is left out."""
        kind = self._signature.get(pointer)
        return 0 if kind is None else _BYTES.get(kind.lstrip("*").removesuffix(":16"), 1)


def _norm(v: _Variant) -> Work:
    return Work(bytes=v["HIDDEN_SIZE"] * (v.itemsize("x") + v.itemsize("out") + 2 * v.itemsize("residual")))


_WORK: Final[dict[str, Callable[[_Variant], Work]]] = {
    "_activation_kernel": lambda v: Work(bytes=v["BLOCK"] * (2 + v["GATED"]) * v.itemsize("x")),
    "_copy_kernel": lambda v: Work(bytes=2 * v["BLOCK"] * (v.itemsize("k_from") + v.itemsize("v_from"))),
    "_layer_norm_kernel": _norm,
    "_prefill": lambda v: Work(flop=4 * v["BLOCK_M"] * v["BLOCK_N"] * v["HEAD_DIM"]),
    "_rms_norm_kernel": _norm,
    "_scan_kernel": lambda v: Work(bytes=v["BLOCK"] * (v.itemsize("p_logits") + v.itemsize("p_copy"))),
    "_sum_kernel": lambda v: Work(bytes=v["BLOCK"] * v.itemsize("p_logits")),
    "cascade_kernel": lambda v: Work(flop=4 * v["BLOCK_M"] * v["BLOCK_N"] * v["HEAD_DIM"]),
    "decode_kernel": lambda v: Work(bytes=2 * v["BLOCK_N"] * v["HEAD_DIM"] * v.cached),
    "invariant_kernel": lambda v: Work(
        flop=4 * v["BLOCK_M"] * v["BLOCK_N"] * v["HEAD_DIM"],
        bytes=2 * v["BLOCK_N"] * v["HEAD_DIM"] * v.itemsize("p_k_cache"),
    ),
}
"""Kernel -> its work, from its constants and the sizes of its tensors' elements."""


def work(launch: Launch) -> Work:
    """Return what one round of a variant's main loop does; a kernel without an entry does nothing that is counted."""
    count: Any = _WORK.get(launch.kernel)
    return count(_Variant(launch)) if count else Work()
