"""The order of low-latency kernels on streams, with doubles of streams and events."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ep_moe.comm import nvlink_rounds
from ep_moe.comm.nvlink_rounds import Rounds


class Stream:
    """A stream that keeps the work it must be behind: its own, and that of events waited for."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle
        self.done: set[str] = set()
        self.waits = 0

    def wait_event(self, event: Event) -> None:
        self.waits += 1
        self.done |= event.done


class Event:
    """A point in a stream."""

    records = 0

    def __init__(self) -> None:
        self.done: set[str] = set()

    def record(self, stream: Stream) -> None:
        Event.records += 1
        self.done = set(stream.done)


class Device:
    """Rounds on a GPU with several streams; ``behind`` is what each kernel was ordered behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams = [Stream(handle) for handle in range(3)]
        self.current = self.streams[0]
        self.behind: dict[str, set[str]] = {}
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(nvlink_rounds, "current_stream", lambda device: self.current)
        monkeypatch.setattr(nvlink_rounds, "stream_handle", lambda device: self.current.cuda_stream)
        Event.records = 0
        self.rounds = Rounds("dispatches", 0)

    def launch(self, name: str) -> None:
        self.behind[name] = set(self.current.done)
        self.current.done.add(name)

    def exchange(self, stream: int, name: str, capturing: bool = False) -> None:
        self.current = self.streams[stream]
        self.rounds.exchange(capturing, self.launch, name)

    def send(self, stream: int, name: str, capturing: bool = False) -> int:
        self.current = self.streams[stream]
        return self.rounds.send(capturing, self.launch, name)

    def receive(self, stream: int, number: int, name: str, capturing: bool = False) -> None:
        self.current = self.streams[stream]
        self.rounds.receive(number, capturing, self.launch, name)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    return Device(monkeypatch)


def test_one_stream_needs_no_waits(device: Device) -> None:
    for name in "abcd":
        device.exchange(0, name)
    number = device.send(0, "send")
    device.receive(0, number, "receive")
    assert device.streams[0].waits == 0
    assert Event.records == 4 + 2  # one of a round that is one kernel


def test_rounds_of_several_streams_are_in_order(device: Device) -> None:
    device.exchange(0, "a")
    device.exchange(1, "b")
    assert device.behind["b"] == {"a"}
    third = device.send(2, "c sends")
    assert device.behind["c sends"] == {"a", "b"}
    device.exchange(0, "d")
    assert device.behind["d"] == {"a", "b", "c sends"}
    device.receive(1, third, "c receives")
    assert "c sends" in device.behind["c receives"]
    device.exchange(2, "e")  # takes the place of c, behind the receive of which it must be, and is behind the send of d
    assert {"c receives", "d"} <= device.behind["e"]
    fourth = device.send(0, "f sends")
    device.receive(2, fourth, "f receives")
    device.exchange(1, "g")
    device.exchange(1, "h")
    assert "f receives" in device.behind["h"] and "f sends" in device.behind["g"]


def test_third_round_under_way_is_refused(device: Device) -> None:
    first, _ = device.send(0, "a"), device.send(0, "b")
    for start in (device.send, device.exchange):
        with pytest.raises(RuntimeError, match="dispatches: at most 2 may be under way"):
            start(0, "c")
    device.receive(0, first, "a receives")
    device.exchange(0, "c")
    with pytest.raises(RuntimeError, match="at most 2"):  # b has not been received
        device.exchange(0, "d")
    assert "d" not in device.behind


def test_a_launch_that_fails_is_no_round(device: Device) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(name)

    for _ in range(3):
        with pytest.raises(RuntimeError, match="no kernel"):
            device.rounds.send(False, fail, "no kernel")
    assert device.send(0, "a") == 1


def test_captured_rounds_use_no_events(device: Device) -> None:
    device.exchange(0, "a", capturing=True)
    number = device.send(1, "b", capturing=True)
    device.receive(1, number, "b receives", capturing=True)
    assert Event.records == 0 and all(stream.waits == 0 for stream in device.streams)
