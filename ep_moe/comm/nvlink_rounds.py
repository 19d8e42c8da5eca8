"""The order of low-latency kernels on streams that may differ from call to call."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ep_moe.comm.low_latency import IN_FLIGHT
from ep_moe.native import current_stream, stream_handle


class _Point:
    """A place in a stream, moved on from round to round: an event made anew costs more than the launch it orders."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._event = torch.cuda.Event()
        self._stream: int | None = None

    def mark(self) -> None:
        """Behind everything on the current stream."""
        stream = current_stream(self._device)
        self._event.record(stream)
        self._stream = stream.cuda_stream

    def wait(self) -> None:
        """Make the current stream wait, if it is another one."""
        if self._stream is not None and self._stream != stream_handle(self._device):
            current_stream(self._device).wait_event(self._event)


class Rounds:
    """Orders the rounds of one direction: sends among themselves, and behind the receive of the round before last.

    While a CUDA graph is captured no events are used: the graph is captured on one stream, and the stream that replays
    it orders it against the rest.
    """

    def __init__(self, what: str, device: int) -> None:
        """``what`` there are rounds of, for messages; ``device`` is the index of a GPU."""
        self._what = what
        self._sent = 0
        self._waiting: set[int] = set()  # rounds sent and not received
        # Of a round at its number modulo IN_FLIGHT: it has been received when the next one of this place is sent.
        self._sends = tuple(_Point(device) for _ in range(IN_FLIGHT))
        self._receives = tuple(_Point(device) for _ in range(IN_FLIGHT))

    def send(self, launch: Callable[[], None]) -> int:
        """Launch the send of a new round; returns its number."""
        number = self._sent + 1
        if any(waiting <= number - IN_FLIGHT for waiting in self._waiting):
            raise RuntimeError(
                f"{self._what}: at most {IN_FLIGHT} may be under way; call the hook of the one before last first"
            )
        if torch.cuda.is_current_stream_capturing():
            launch()
        else:
            self._receives[number % IN_FLIGHT].wait()
            self._sends[self._sent % IN_FLIGHT].wait()
            launch()
            self._sends[number % IN_FLIGHT].mark()
        self._sent = number
        self._waiting.add(number)
        return number

    def receive(self, number: int, launch: Callable[[], None]) -> None:
        """Launch the receive of a round."""
        if torch.cuda.is_current_stream_capturing():
            launch()
        else:
            self._sends[number % IN_FLIGHT].wait()
            launch()
            self._receives[number % IN_FLIGHT].mark()
        self._waiting.discard(number)
