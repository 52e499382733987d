"""This module makes Triton's interpreter as strict and as exact as a GPU. It does not know the kernels.

The interpreter keeps bfloat16 and fp8 as their bits and computes on them as if they were integers, truncates where a
GPU rounds to nearest even, and reads and writes wherever a pointer points. With `install`:

- casts round to nearest even (fp8 saturates), bfloat16 and fp8 arithmetic is done in float32 and rounded once, float32
  dots that do not ask for ieee lose the bits that tf32 loses, and a maximum ignores NaN where the instruction does;
- every lane of a load, store or atomic that its mask lets through must lie inside a tensor passed to the launch;
- a launch neither warns about infinities and NaN nor copies its arguments back onto themselves.
"""

from __future__ import annotations

import linecache
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_TORCH_DTYPE = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}


class OutOfBoundsError(AssertionError):
    """A lane that its mask lets through lies outside every tensor of the launch; says which line of the kernel."""


def widen(bits: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Return the numbers behind the bits of bfloat16 or fp8 as float32; anything else as it is."""
    if dtype == tl.bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype not in _TORCH_DTYPE:
        return bits
    return torch.from_numpy(np.array(bits, dtype=np.uint8)).view(_TORCH_DTYPE[dtype]).float().numpy()


def narrow(x: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Return the bits of numbers rounded to bfloat16 or fp8, to nearest even; fp8 saturates."""
    if dtype == tl.bfloat16:
        bits = np.array(x, dtype=np.float32).view(np.uint32)
        rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
        return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)
    clamped = torch.from_numpy(np.clip(np.array(x, dtype=np.float32), -_LARGEST[dtype], _LARGEST[dtype]))
    return clamped.to(_TORCH_DTYPE[dtype]).view(torch.uint8).numpy()


def _is_narrow(*handles: TensorHandle) -> bool:
    return any(handle.dtype.scalar in _TORCH_DTYPE for handle in handles)


def _wide(handle: TensorHandle) -> np.ndarray:
    return widen(handle.data, handle.dtype.scalar)


def _rounded(x: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    return TensorHandle(narrow(x, dtype) if dtype in _TORCH_DTYPE else x, dtype)


def _cast(old: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast(self: InterpreterBuilder, src: TensorHandle, to: tl.dtype, *rounding: Any) -> TensorHandle:
        truncated = any(mode == interpreter._ir.ROUNDING_MODE.RTZ for mode in rounding)
        if truncated or not (_is_narrow(src) or to.scalar in _TORCH_DTYPE):
            return old(self, src, to, *rounding)
        if to.scalar in _TORCH_DTYPE:
            return TensorHandle(narrow(_wide(src), to.scalar), to.scalar)
        return TensorHandle(_wide(src).astype(interpreter._get_np_dtype(to)), to.scalar)

    return cast


_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _binary(old: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def binary(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if op in _BITWISE or not _is_narrow(lhs, rhs):
            return old(self, lhs, rhs, op)
        result = op(_wide(lhs), _wide(rhs))
        return TensorHandle(result, tl.int1) if result.dtype == bool else _rounded(result, lhs.dtype.scalar)

    return binary


def _unary(old: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def unary(self: InterpreterBuilder, arg: TensorHandle, op: Any) -> TensorHandle:
        return _rounded(op(_wide(arg)), arg.dtype.scalar) if _is_narrow(arg) else old(self, arg, op)

    return unary


def _ternary(old: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def ternary(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, op: Any) -> TensorHandle:
        if op is np.where or not _is_narrow(c):
            return old(self, a, b, c, op)
        return _rounded(op(_wide(a), _wide(b), _wide(c)), c.dtype.scalar)

    return ternary


def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    # The product of two float32 is exact in float64, so that the sum is all but rounded once.
    exact = _wide(x).astype(np.float64) * _wide(y) + _wide(z)
    narrow_or_half = np.float32 if _is_narrow(z) else z.data.dtype
    return _rounded(exact.astype(narrow_or_half), z.dtype.scalar)


def _dot(old: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def operand(handle: TensorHandle, precision: Any) -> TensorHandle:
        if handle.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            kept = np.array(handle.data).view(np.uint32) + 0x1000 & 0xFFFFE000
            return TensorHandle(kept.view(np.float32), tl.float32)
        return TensorHandle(_wide(handle), tl.float32) if _is_narrow(handle) else handle

    def dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, chunk: Any
    ) -> TensorHandle:
        return old(self, operand(a, precision), operand(b, precision), d, precision, chunk)

    return dot


def _without_nan(op: Any) -> Callable[..., TensorHandle]:
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, op)


_ranges: list[tuple[int, int]] = []
"""[first byte, byte past the last) of every tensor passed to the launch that is running."""


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        argument = getattr(argument, "base", argument)  # of a descriptor, or of a reinterpreted tensor
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, torch.Tensor):
            yield argument


def _range(x: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


def _check_lanes(ptrs: TensorHandle, mask: TensorHandle | np.ndarray | None, verb: str) -> None:
    lanes, size = ptrs.data, max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    if mask is not None:
        m_lane = np.broadcast_to(getattr(mask, "data", mask), lanes.shape)
        lanes = lanes if m_lane.all() else lanes[m_lane]
    if not lanes.size:
        return
    first, last = int(lanes.min()), int(lanes.max())
    if any(start <= first and last + size <= end for start, end in _ranges):
        return
    inside = np.zeros(lanes.shape, dtype=bool)
    for start, end in _ranges:
        inside |= (lanes >= np.uint64(start)) & (lanes <= np.uint64(max(end - size, 0)))
    if not inside.all():
        raise OutOfBoundsError(f"{int((~inside).sum())} of {lanes.size} lanes {verb} out of bounds at {_kernel_line()}")


def _kernel_line() -> str:
    """Return the innermost line on the stack that is neither Triton's nor ours."""
    frames = [f for f in traceback.extract_stack() if "/triton/" not in f.filename and f.filename != __file__]
    path, number = frames[-1].filename, frames[-1].lineno or 0
    return f"{path.rpartition('/')[2]}:{number}: {linecache.getline(path, number).strip()}"


def _checked(old: Callable[..., Any], verb: str, mask_at: int | None) -> Callable[..., Any]:
    """Return a memory operation that checks its lanes first; `mask_at`: its mask's place after the pointer."""

    def checked(self: InterpreterBuilder, *arguments: Any) -> Any:
        ptrs, *rest = arguments
        _check_lanes(ptrs, None if mask_at is None else rest[mask_at], verb)
        return old(self, *arguments)

    return checked


def _atomic(old: Callable[..., Any]) -> Callable[..., Any]:
    def atomic(self: InterpreterBuilder, op: Any, ptr: TensorHandle, val: TensorHandle, mask: Any, *rest: Any) -> Any:
        assert not _is_narrow(val), "the interpreter adds the bits of bfloat16"
        _check_lanes(ptr, mask, "of an atomic")
        return old(self, op, ptr, val, mask, *rest)

    return atomic


@contextmanager
def _launch(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    previous = _ranges[:]
    _ranges[:] = [_range(x) for x in tensors if x.numel()]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    except InterpreterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OutOfBoundsError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise
    finally:
        _ranges[:] = previous


def _launched(old: Callable[..., None]) -> Callable[..., None]:
    def launched(self: GridExecutor, *arguments: Any, **options: Any) -> None:
        with _launch(_tensors((*arguments, *options.values()))):
            old(self, *arguments, **options)

    return launched


def _leave_in_place(self: GridExecutor, arguments: Any, *rest: Any) -> None:
    """Copy nothing back: the interpreter's copies of CPU tensors are the tensors themselves."""


def install() -> None:
    """Change the interpreter of this process for good; a second call changes nothing."""
    builder: Any = InterpreterBuilder
    if hasattr(builder, "get_bf16"):
        return
    builder.get_bf16 = lambda self, value: _rounded(np.array([value], dtype=np.float32), tl.bfloat16)
    builder.cast_impl, builder.create_fp_to_fp = _cast(builder.cast_impl), _cast(builder.create_fp_to_fp)
    builder.binary_op, builder.unary_op = _binary(builder.binary_op), _unary(builder.unary_op)
    builder.ternary_op, builder.create_fma = _ternary(builder.ternary_op), _fma
    builder.create_dot = _dot(builder.create_dot)
    builder.create_maxnumf, builder.create_minnumf = _without_nan(np.fmax), _without_nan(np.fmin)
    builder.create_masked_load = _checked(builder.create_masked_load, "read", 0)
    builder.create_masked_store = _checked(builder.create_masked_store, "write", 1)
    builder.create_atomic_cas = _checked(builder.create_atomic_cas, "of an atomic", None)
    builder.create_atomic_rmw = _atomic(builder.create_atomic_rmw)
    executor: Any = GridExecutor
    executor.__call__ = _launched(executor.__call__)
    executor._restore_args_dev = _leave_in_place
    # Once for all instead of at every launch and every call of a helper: it takes milliseconds.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
