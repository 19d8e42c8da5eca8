"""The order of low-latency kernels on streams that may differ from call to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ep_moe.comm.low_latency import IN_FLIGHT


@dataclass(frozen=True)
class _Point:
    """A place in a stream."""

    stream: torch.cuda.Stream
    event: torch.cuda.Event

    @classmethod
    def now(cls) -> _Point:
        stream = torch.cuda.current_stream()
        return cls(stream, stream.record_event())

    def wait(self) -> None:
        stream = torch.cuda.current_stream()
        if stream != self.stream:
            stream.wait_event(self.event)


class Rounds:
    """Orders the rounds of one direction: sends among themselves, and behind the receive of the round before last.

    While a CUDA graph is captured no events are used: the graph is captured on one stream, and the stream that replays
    it orders it against the rest.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._sent = 0
        self._waiting: set[int] = set()  # rounds sent and not received
        self._last_send: _Point | None = None
        self._sends: dict[int, _Point] = {}
        self._receives: dict[int, _Point] = {}

    def send(self, launch: Callable[[], None]) -> int:
        """Launch the send of a new round; returns its number."""
        oldest = self._sent + 1 - IN_FLIGHT
        if any(number <= oldest for number in self._waiting):
            raise RuntimeError(
                f"{self._what}: at most {IN_FLIGHT} may be under way; call the hook of the one before last first"
            )
        self._sent += 1
        before = self._receives.pop(oldest, None)
        if torch.cuda.is_current_stream_capturing():
            launch()
        else:
            for point in (before, self._last_send):
                if point is not None:
                    point.wait()
            launch()
            self._last_send = self._sends[self._sent] = _Point.now()
        self._waiting.add(self._sent)
        return self._sent

    def receive(self, number: int, launch: Callable[[], None]) -> None:
        """Launch the receive of a round."""
        sent = self._sends.pop(number, None)
        if torch.cuda.is_current_stream_capturing():
            launch()
        else:
            if sent is not None:
                sent.wait()
            launch()
            self._receives[number] = _Point.now()
        self._waiting.discard(number)
