"""Events, and the stream on which operations run that the caller's stream does not wait for.

Without CUDA everything is done when a call returns: events hold nothing and waiting for them does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ep_moe.native import stream_handle
from ep_moe.streams import tensors_in

T = TypeVar("T")


class EventHandle:
    """A point of the stream that is current where it is made.

    Attributes:
        event: the CUDA event, or ``None`` where CUDA has not been used.
    """

    def __init__(self) -> None:
        self.event: torch.cuda.Event | None = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.event = torch.cuda.current_stream().record_event()

    def current_stream_wait(self) -> None:
        """Make the current stream wait for it."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class EventOverlap:
    """What an operation returns to be waited for; as a context manager it waits at the end.

    Attributes:
        event: the point to wait for, or ``None`` if there is nothing to wait for.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Make the current stream wait for it."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *exception: object) -> None:
        self.current_stream_wait()


class CommunicationStream:
    """Runs operations of one buffer; beside the caller's stream if asked to."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, device: torch.device) -> torch.cuda.Stream:
        """The communication stream of a GPU."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def run(
        self,
        device: torch.device,
        operation: Callable[[], T],
        inputs: Iterable[Any],
        previous_event: EventOverlap | None,
        async_finish: bool,
    ) -> tuple[T, EventOverlap]:
        """Run ``operation`` on the communication stream, for a call with ``previous_event`` or ``async_finish``.

        Other calls need none of this: they run where the caller's tensors are used anyway.

        Args:
            device: of the tensors.
            operation: works on the current stream.
            inputs: all tensors of the caller that it uses, within tuples, lists and dataclasses.
            previous_event: waited for before, instead of everything that is on the current stream.
            async_finish: leave it to the caller to wait for the event.

        Returns:
            What ``operation`` returned, and the event after it, which holds nothing unless ``async_finish``.
        """
        if device.type != "cuda":
            return operation(), EventOverlap(EventHandle() if async_finish else None)
        current = torch.cuda.current_stream(device.index)
        beside = self.of(device)
        before = None if previous_event is None or previous_event.event is None else previous_event.event.event
        if before is None:
            beside.wait_stream(current)
        else:
            beside.wait_event(before)
        with torch.cuda.stream(beside):
            result = operation()
            event = EventOverlap(EventHandle() if async_finish else None)
        record_use(inputs, beside)
        record_use(_with_handles(result), current)
        if not async_finish:
            current.wait_stream(beside)
        return result, event


class NothingToWaitFor(EventOverlap):
    """Of an operation that the current stream has waited for. Most are, so this one is made without Python code."""

    event = None
    extra_tensors = None
    __init__ = object.__init__


class UsedByStreams:
    """Base of handles: the allocator is told once of each stream that uses their tensors.

    Attributes:
        home: the stream they were made on, which it knows; ``None`` on a CPU.
    """

    home: int | None = None
    _told: frozenset[int] = frozenset()

    def tensors(self) -> Any:
        """What it holds: tensors, or tuples, lists and dataclasses of them."""
        raise NotImplementedError

    def use(self, device: torch.device) -> None:
        """The current stream of the GPU ``device`` uses the tensors; called if it is not :attr:`home`."""
        stream = stream_handle(device.index)
        if stream not in self._told:
            record_use([self.tensors()], torch.cuda.current_stream(device))
            self._told |= {stream}


def record_use(values: Iterable[Any], stream: torch.cuda.Stream) -> None:
    """Keep the memory of tensors from being used anew before ``stream`` is done with them."""
    for tensor in tensors_in(list(values)):
        if tensor.is_cuda:
            tensor.record_stream(stream)


def _with_handles(result: Any) -> Iterator[Any]:
    """A result, or those of a tuple, and of handles among them what they hold, which some make up when asked for."""
    for item in result if isinstance(result, tuple) else (result,):
        yield item.tensors() if isinstance(item, UsedByStreams) else item
