"""What calls between GPUs leave behind when they fail, with doubles of GPUs."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ep_moe.comm import CapacityError, PeerTimeoutError, nvlink, nvlink_core, nvlink_low_latency
from ep_moe.comm import nvlink_args as native
from ep_moe.comm import nvlink_low_latency_args as low_latency_native
from ep_moe.comm.nvlink import NvlinkCommunicator
from ep_moe.comm.nvlink_core import NvlinkCore
from ep_moe.comm.nvlink_layout import KnownSizes
from ep_moe.comm.nvlink_low_latency import NvlinkLowLatencyCommunicator
from ep_moe.comm.nvlink_rows import Sending
from ep_moe.comm.symmetric_transport import NodeExchangeArgs, SymmetricTransport


class Rounds:
    """Takes every round."""

    received = 0

    def send(self, *arguments: Any) -> int:
        return 1

    def receive(self, *arguments: Any) -> None:
        self.received += 1


def test_a_hook_that_told_of_a_timeout_can_be_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stream_handle", "current_stream"):
        monkeypatch.setattr(nvlink_low_latency, name, lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    failed = False

    def check() -> None:
        if failed:
            raise PeerTimeoutError("rank 1 did not come", 1)

    communicator = object.__new__(NvlinkLowLatencyCommunicator)
    communicator.device, communicator._lock = torch.device("cuda", 0), threading.Lock()
    communicator._faults = SimpleNamespace(check=check)  # type: ignore[assignment]
    communicator._reach = SimpleNamespace(library=None, prefix="low_latency")  # type: ignore[assignment]
    rounds, arguments = Rounds(), SimpleNamespace(ll=SimpleNamespace(phases=0))
    hook = communicator._start("dispatch", arguments, rounds, True, ())  # type: ignore[arg-type]
    failed = True
    with pytest.raises(PeerTimeoutError):
        hook()
    failed = False  # as after mask_rank()
    hook()
    assert rounds.received == 1
    with pytest.raises(RuntimeError, match="the hook of a dispatch was called twice"):
        hook()


def test_low_latency_memory_that_could_not_be_had_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(reach: object, shape: low_latency_native.LowLatencyShape, *arguments: Any) -> None:
        asked.append(shape.row_bytes)
        raise RuntimeError("no room")

    asked: list[int] = []
    monkeypatch.setattr(nvlink_low_latency, "allocate_landing", no_room)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    communicator = object.__new__(NvlinkLowLatencyCommunicator)
    communicator._common = low_latency_native.LowLatency()
    communicator._common.shape.max_top_k, communicator._common.shape.row_bytes = 8, 128
    communicator._landing = object()  # type: ignore[assignment]
    communicator._captured, communicator._reach = False, None  # type: ignore[assignment]
    communicator.size, communicator.max_tokens, communicator.num_experts, communicator.hidden = 2, 8, 4, 128
    communicator.rank, communicator.device = 0, torch.device("cpu")
    for row_bytes in (256, 128):  # there was room for the short rows before
        with pytest.raises(RuntimeError, match="no room"):
            communicator._reserve(8, row_bytes)
    assert asked == [256, 128]


def no_room(*arguments: Any) -> None:
    raise torch.OutOfMemoryError("no room")


def test_a_buffer_that_cannot_grow_keeps_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvlink_core, "allocate_symmetric", no_room)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    core = object.__new__(NvlinkCore)
    core.group, core.device, core.size = None, torch.device("cpu"), 2  # type: ignore[assignment]
    core._captured, core._comm = False, native.CommunicatorArgs(rank=1)
    core._library = SimpleNamespace(ep_moe_buffer_layout=lambda shape, layout: None)  # type: ignore[assignment]
    core._workspace = torch.full((native.WORKSPACE_WORDS,), 7, dtype=torch.int32)
    core._buffer = buffer = object()  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):
        core.grow(64)
    assert core._buffer is buffer and core._comm.rank == 1 and bool((core._workspace == 7).all())


class Core:
    """Counts dispatches given up."""

    size, max_tokens, multiprocessors, skipped = 1, 32, 132, 0

    def reserve(self, *arguments: Any) -> None: ...

    def grow(self, tokens: int) -> None:
        raise RuntimeError("the symmetric buffer cannot grow")

    def skip_dispatch(self) -> None:
        self.skipped += 1

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


def overflowed(*arguments: Any) -> None:
    raise CapacityError("of an earlier dispatch")


SOURCE: Any = SimpleNamespace(wire=SimpleNamespace(bytes=128), send=lambda core, early, quantizes: Sending(None, 8))


def dispatching(monkeypatch: pytest.MonkeyPatch, sizes: Any, start: Any) -> tuple[NvlinkCommunicator, Core]:
    """A communicator whose dispatches learn what ``sizes`` returns, and then call ``start``."""
    places = SimpleNamespace(tokens=SimpleNamespace(experts=2, top_k=1), counts=None, ends=None)
    monkeypatch.setattr(nvlink, "lay_out", lambda *arguments, **options: places)
    monkeypatch.setattr(nvlink, "RowDispatch", lambda *arguments, **options: SimpleNamespace(start=start))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    communicator, core = object.__new__(NvlinkCommunicator), Core()
    communicator._core, communicator.size = core, 1  # type: ignore[assignment]
    communicator._host_counts = SimpleNamespace(wait=sizes)  # type: ignore[assignment]
    return communicator, core


@pytest.mark.parametrize(
    ("sizes", "start", "error"),
    [
        pytest.param(lambda experts: (64, KnownSizes((64, 0), 64)), no_room, "cannot grow", id="larger buffer"),
        pytest.param(lambda experts: (32, KnownSizes((32, 0), 32)), no_room, "no room", id="rows"),
        pytest.param(overflowed, no_room, "of an earlier dispatch", id="earlier overflow"),
    ],
)
def test_a_dispatch_that_cannot_go_on_is_given_up(
    sizes: Any, start: Any, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tokens have been sent by then: the next dispatch must not take them for its own.
    communicator, core = dispatching(monkeypatch, sizes, start)
    topk_idx = torch.zeros(64, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=error):
        communicator._dispatch(SOURCE, topk_idx, None, groups=1, num_experts=2)
    assert core.skipped == 1


def test_a_dispatch_along_known_routes_without_room_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    communicator, core = dispatching(monkeypatch, None, no_room)
    places = SimpleNamespace(experts=2, top_k=1)
    handle = SimpleNamespace(tokens=4, top_k=1, places=places, num_sms=None, nodes=None, num_rows=lambda layout: 4)
    with pytest.raises(torch.OutOfMemoryError):
        communicator._dispatch_cached(SOURCE, handle, "rows", 1)  # type: ignore[arg-type]
    assert core.skipped == 1


def test_memory_between_nodes_that_could_not_be_had_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(num_bytes: int) -> None:
        asked.append(num_bytes)
        raise RuntimeError("no room")

    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    transport = object.__new__(SymmetricTransport)
    transport._device, transport._nodes, transport._channels = torch.device("cpu"), 2, 1
    transport._allocate, transport._workspace = no_room, torch.zeros(4)  # type: ignore[assignment]
    transport._arguments = NodeExchangeArgs(slot_bytes=32 * 16)
    wide, narrow = torch.zeros(2, 8), torch.zeros(2, 4)
    for rows in (wide, narrow):  # there was room for the narrow ones before
        with pytest.raises(RuntimeError, match="no room"):
            transport.reserve([rows])
    assert len(asked) == 2 and asked[1] < asked[0]
