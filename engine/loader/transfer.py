"""This module holds how pieces of files reach memory: one after the other, or read ahead by threads into buffers from
which a device copies by itself. It does not know parameters or file formats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

__all__ = ["CudaLink", "Link", "Mark", "pieces_in_order"]

NUM_BUFFERS, NUM_READERS = 8, 4
"""One thread copies a file from the page cache at a few GB/s, less than a link takes."""

Read = Callable[[int, torch.Tensor], torch.Tensor]


class Mark(Protocol):
    """A moment in the order of a link's copies."""

    def synchronize(self) -> None:
        """Wait until all copies before it are done."""


class Link(Protocol):
    """The way from buffers to a device; copies are done in order, and not at once."""

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Return [num_bytes] uint8 memory of the host that the device can read by itself."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy a source that lies in such a buffer, or anywhere, to the device."""

    def mark(self) -> Mark:
        """Return where the copies begun so far end."""
        ...


class CudaLink:
    """Page-locked buffers and copies on the current stream."""

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """See `Link`."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `Link`; a source that is not page-locked has been read when this returns."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        """See `Link`."""
        event = torch.cuda.Event()
        event.record()
        return event


def pieces_in_order(sizes: Sequence[int], read: Read, link: Link | None) -> Generator[torch.Tensor, None, None]:
    """Yield what `read` makes of each piece; it is valid until the next is asked for, and for the copies begun before.

    Args:
        sizes: bytes of each piece.
        read: called with a piece's number and [at least so many bytes] uint8, which it may use. With a link also by
            other threads, several at a time and ahead of what is yielded.
        link: None: read each piece when it is asked for, into the same memory.
    """
    most = max(sizes, default=0)
    if link is None:
        buffer = torch.empty(most, dtype=torch.uint8)
        yield from (read(number, buffer) for number in range(len(sizes)))
        return
    buffers = [link.buffer(most) for _ in range(min(NUM_BUFFERS, len(sizes)))]
    free_from: list[Mark | None] = [None] * len(buffers)

    def fetch(number: int) -> torch.Tensor:
        if (mark := free_from[number % len(buffers)]) is not None:
            mark.synchronize()
        return read(number, buffers[number % len(buffers)])

    readers = ThreadPoolExecutor(NUM_READERS, "octavo-weights")
    try:
        coming: deque[Future[torch.Tensor]] = deque(readers.submit(fetch, number) for number in range(len(buffers)))
        for number in range(len(sizes)):
            yield coming.popleft().result()
            free_from[number % len(buffers)] = link.mark()
            if number + len(buffers) < len(sizes):
                coming.append(readers.submit(fetch, number + len(buffers)))
        link.mark().synchronize()
    finally:
        readers.shutdown(cancel_futures=True)
