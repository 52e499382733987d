"""This module holds how a check calls an op on whatever machine it runs. It does not know the ops.

Checks draw their inputs on the CPU and compare there. `calls.rms_norm(...)` is `octavo.kernels.rms_norm(...)` on the
device that the backend in force runs on: arguments are moved with their strides and aliases, what the op writes in
place is brought back, and so is its result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, Final

import octavo.kernels
import torch
from octavo.kernels.dispatch import current_backend, interpreted
from torch import Tensor

INTERPRETER: Final = interpreted() and importlib.util.find_spec("triton") is not None
"""Whether Triton's kernels run in its interpreter here."""


def device() -> torch.device:
    """Return where the backend in force computes."""
    return torch.device("cuda" if current_backend() == "triton" and not interpreted() else "cpu")


def _each(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Return `x` with every tensor in it changed: in tuples, lists, named tuples and dataclasses."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, list | tuple):
        items = [_each(change, item) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: _each(change, getattr(x, field.name)) for field in fields(x) if field.init})
    return x


def _bytes(x: Tensor) -> Tensor:
    """Return the whole storage behind a tensor."""
    return torch.tensor([], dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def _view(storage: Tensor, like: Tensor) -> Tensor:
    """Return the tensor that lies in `storage` as `like` lies in its own."""
    flat = torch.tensor([], dtype=like.dtype, device=storage.device)
    return flat.set_(storage.untyped_storage(), like.storage_offset(), like.shape, like.stride())


def call(op: str, *arguments: Any, **options: Any) -> Any:
    """Call one op on the backend in force; the arguments and the result are on the CPU, except for plans."""
    function, where = getattr(octavo.kernels, op), device()
    if where.type == "cpu":
        return function(*arguments, **options)
    return call_elsewhere(function, lambda storage: storage.to(where), arguments, options, op.startswith("plan_"))


def call_elsewhere(
    function: Callable[..., Any],
    move: Callable[[Tensor], Tensor],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    stays: bool = False,
) -> Any:
    """Call a function on copies that `move` makes of whole storages; bring back what they then hold, and the result.

    Args:
        stays: whether the result is left where it is.
    """
    storages: dict[int, tuple[Tensor, Tensor]] = {}
    given: dict[int, tuple[Tensor, Tensor]] = {}

    def there(x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return x
        at = x.untyped_storage().data_ptr()
        if at not in storages:
            home = _bytes(x)
            storages[at] = home, move(home)
        moved = _view(storages[at][1], x)
        given[id(moved)] = x, moved
        return moved

    def back(x: Tensor) -> Tensor:
        return given[id(x)][0] if id(x) in given else x.cpu()

    arguments, options = _each(there, arguments), {name: _each(there, x) for name, x in options.items()}
    result = function(*arguments, **options)
    for home, moved in storages.values():
        home.copy_(moved)
    return result if stays else _each(back, result)


def __getattr__(op: str) -> Callable[..., Any]:
    if op not in octavo.kernels.__all__:
        raise AttributeError(op)
    return partial(call, op)
