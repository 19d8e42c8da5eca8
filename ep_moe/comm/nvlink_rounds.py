"""The order of low-latency kernels on streams that may differ from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ep_moe.comm.low_latency import IN_FLIGHT
from ep_moe.native import current_stream, stream_handle


class _Point:
    """A place in a stream, moved on from round to round: an event made anew costs more than the launch it orders."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self.stream: int | None = None  # by its handle; None before the first mark

    def mark(self, device: int) -> None:
        """Behind everything on the current stream."""
        stream = current_stream(device)
        self._event.record(stream)
        self.stream = stream.cuda_stream

    def wait(self, device: int) -> None:
        """Make the current stream wait; for nothing if it is :attr:`stream`."""
        if self.stream is not None:
            current_stream(device).wait_event(self._event)


class Rounds:
    """Orders the rounds of one direction: sends among themselves, and behind the receive of the round before last.

    While a CUDA graph is captured no events are used: the graph is captured on one stream, and the stream that replays
    it orders it against the rest.
    """

    def __init__(self, what: str, device: int) -> None:
        """``what`` there are rounds of, for messages; ``device`` is the index of a GPU."""
        self._what = what
        self._device = device
        self._sent = 0
        self._waiting: set[int] = set()  # rounds sent and not received
        # Of a round at its number modulo IN_FLIGHT: it has been received when the next one of this place is sent. The
        # ends of a round that one kernel sends and receives are one point.
        self._own_sends, self._own_receives = ([_Point() for _ in range(IN_FLIGHT)] for _ in range(2))
        self._sends, self._receives = list(self._own_sends), list(self._own_receives)

    def exchange(self, capturing: bool, launch: Callable[..., None], *arguments: Any) -> None:
        """Launch a new round, sent and received by one kernel.

        Args:
            capturing: whether the current stream is being captured.
            launch: called with ``arguments``.
            *arguments: of ``launch``.

        Raises:
            RuntimeError: if the round before last has not been received.
        """
        number = self._begin(capturing)
        launch(*arguments)
        if not capturing:
            place = number % IN_FLIGHT
            point = self._sends[place] = self._receives[place] = self._own_receives[place]
            point.mark(self._device)
        self._sent = number

    def send(self, capturing: bool, launch: Callable[..., None], *arguments: Any) -> int:
        """Launch the send of a new round, as :meth:`exchange`; returns its number."""
        number = self._begin(capturing)
        launch(*arguments)
        if not capturing:
            place = number % IN_FLIGHT
            point = self._sends[place] = self._own_sends[place]
            point.mark(self._device)
        self._sent = number
        self._waiting.add(number)
        return number

    def receive(self, number: int, capturing: bool, launch: Callable[..., None], *arguments: Any) -> None:
        """Launch the receive of a round."""
        place = number % IN_FLIGHT
        if not capturing:
            self._wait_for(self._sends[place])
        launch(*arguments)
        if not capturing:
            point = self._receives[place] = self._own_receives[place]
            point.mark(self._device)
        self._waiting.discard(number)

    def _begin(self, capturing: bool) -> int:
        number = self._sent + 1
        if self._waiting and any(waiting <= number - IN_FLIGHT for waiting in self._waiting):
            raise RuntimeError(
                f"{self._what}: at most {IN_FLIGHT} may be under way; call the hook of the one before last first"
            )
        if not capturing:
            self._wait_for(self._receives[number % IN_FLIGHT], self._sends[self._sent % IN_FLIGHT])
        return number

    def _wait_for(self, *points: _Point) -> None:
        stream = stream_handle(self._device)
        for point in points:
            if point.stream != stream:
                point.wait(self._device)
