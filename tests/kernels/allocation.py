"""This module holds allocators that hand out NaN, so that memory nobody wrote shows. It does not know the ops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

_empty, _empty_like, _new_empty = torch.empty, torch.empty_like, Tensor.new_empty


def _fill(x: Tensor) -> Tensor:
    if x.is_floating_point() and x.itemsize > 1:
        return x.fill_(float("nan"))
    return x if x.itemsize == 1 else x.fill_(torch.iinfo(x.dtype).min)


def _poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
    return _fill(_empty(*args, **kwargs))


def _poisoned_empty_like(*args: Any, **kwargs: Any) -> Tensor:
    return _fill(_empty_like(*args, **kwargs))


def _poisoned_new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _fill(_new_empty(self, *args, **kwargs))


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Make torch.empty, torch.empty_like and Tensor.new_empty return NaN (integers: the smallest)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _poisoned_empty)
        patch.setattr(torch, "empty_like", _poisoned_empty_like)
        patch.setattr(Tensor, "new_empty", _poisoned_new_empty)
        yield
