"""Work on a side stream: what is waited for, and what keeps its memory.

A side stream first waits for the stream that starts the work, so it sees everything enqueued there so far. Whoever
started the work waits before using the result. Memory needs no wait of the device either:

- what the work reads was allocated for the starting stream, and may be freed there once that has been made to wait:
  until :meth:`Pending.wait` the work is held, and with it what it reads;
- what the work returns was allocated for the side stream; ``wait`` tells the allocator which other stream reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@functools.cache
def communication_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which all layers exchange rows on ``device`` while others compute; ``None`` on a CPU.

    One for all, because exchanges of one group must not overtake each other. Its blocks go before those of GEMMs, or
    a large GEMM that started first would keep them from the GPU until it ends.
    """
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


class Pending(Generic[T]):
    """The result of work that may still be running; see :func:`start`."""

    def __init__(self, work: Callable[[], T], stream: torch.cuda.Stream | None) -> None:
        self._work: Callable[[], T] | None = work
        self._done: torch.cuda.Event | None = None
        if stream is None:
            self._result = work()
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._result = work()
            self._done = stream.record_event()
        self._device = stream.device

    def wait(self) -> T:
        """The result, for use on the current stream, which waits for the work to end; the host does not."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
            record_use(self._result)
        self._work = None
        return self._result


def start(work: Callable[[], T], stream: torch.cuda.Stream | None) -> Pending[T]:
    """Run ``work``, whose kernels go to ``stream``, behind everything enqueued on the current stream.

    Args:
        work: reads tensors of the current stream; must hold them (as a closure does), and record no autograd graph.
            Tensors in its result are found in tuples, lists and dataclasses.
        stream: ``None`` runs the work at once, as on a CPU.
    """
    return Pending(work, stream)


@contextlib.contextmanager
def joined(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Make the current stream wait for ``stream`` at the end of the block, however it ends.

    So memory of the current stream that work there uses may be freed from then on. ``None`` for a CPU.
    """
    try:
        yield
    finally:
        if stream is not None:
            torch.cuda.current_stream(stream.device).wait_stream(stream)


def record_use(value: Any) -> None:
    """Tell the allocator that the current stream reads tensors that may have been allocated for another one.

    ``value`` is a tensor, or a tuple, list or dataclass that holds some.
    """
    for tensor in tensors_in(value):
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that ``value`` is, or holds in tuples, lists and dataclasses."""
    items: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = (getattr(value, field.name) for field in dataclasses.fields(value))
    for item in items:
        if not isinstance(item, int):  # sizes come by the hundred, and looking into each takes as long as a kernel
            yield from tensors_in(item)
