"""Which streams calls of the DeepEP interface wait for and tell the allocator of, with doubles of streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import use_deep_ep
from ranks import run_ranks
from routing_cases import Case, make_inputs
from torch import Tensor

from ep_moe.compat.deep_ep import Buffer, EventHandle, EventOverlap, events
from ep_moe.compat.deep_ep.events import CommunicationStream, NothingToWaitFor
from ep_moe.compat.deep_ep.low_latency import LowLatencyHandle
from ep_moe.compat.deep_ep.normal_handle import NormalHandle

GPU = torch.device("cuda", 0)
CASE = Case(tokens=(6, 9), num_experts=4, top_k=2, hidden=128, dtype=torch.bfloat16)


class Stream:
    """A stream that writes down what it is told."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"event of {self.name}")
        return f"the event of {self.name}"


class Gpu:
    """The current stream of a GPU, and two streams."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.caller, self.beside = Stream("caller", self.log), Stream("beside", self.log)
        self.current = self.caller
        for name in ("is_available", "is_initialized"):
            monkeypatch.setattr(torch.cuda, name, lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.beside)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.on(stream))
        monkeypatch.setattr(events, "stream_handle", lambda device: id(self.current))

    def on(self, stream: Stream) -> Any:
        gpu = self

        class On:
            def __enter__(self) -> None:
                self.before, gpu.current = gpu.current, stream

            def __exit__(self, *exception: object) -> None:
                gpu.current = self.before

        return On()

    def tensor(self, name: str) -> Tensor:
        log = self.log

        class OnGpu(Tensor):
            is_cuda = True

            def record_stream(self, stream: Stream) -> None:
                log.append(f"{name} used by {stream.name}")

        return torch.zeros(2).as_subclass(OnGpu)

    def run(self, operation: Any, inputs: Any, previous: EventOverlap | None, finish: bool) -> tuple[Any, EventOverlap]:
        def logged() -> Any:
            self.log.append(f"work on {self.current.name}")
            return operation()

        return CommunicationStream().run(GPU, logged, inputs, previous, finish)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_async_call_waits_before_and_leaves_an_event(gpu: Gpu) -> None:
    x, y = gpu.tensor("x"), gpu.tensor("y")
    result, event = gpu.run(lambda: y, [x], None, True)
    assert result is y
    assert gpu.log == [
        "beside waits for caller",
        "work on beside",
        "event of beside",
        "x used by beside",
        "y used by caller",
    ]
    gpu.log.clear()
    event.current_stream_wait()
    assert gpu.log == ["caller waits for the event of beside"]


def test_previous_event_is_all_that_is_waited_for(gpu: Gpu) -> None:
    before = EventOverlap(EventHandle())
    gpu.log.clear()
    _, event = gpu.run(lambda: gpu.tensor("y"), [], before, False)
    assert event.event is None
    assert gpu.log == [
        "beside waits for the event of caller",
        "work on beside",
        "y used by caller",
        "caller waits for beside",
    ]


def test_event_that_holds_nothing_stands_for_the_stream(gpu: Gpu) -> None:
    gpu.run(lambda: None, [], NothingToWaitFor(), False)
    assert gpu.log == ["beside waits for caller", "work on beside", "caller waits for beside"]


def test_handles_in_results_are_recorded_and_not_read(gpu: Gpu) -> None:
    """The matrix of a handle is computed from what the work has yet to write."""
    handle = NormalHandle((None, gpu.tensor("in tuple")))
    handle.routes, handle.rows_per_rank = (gpu.tensor("routes"), 3), gpu.tensor("rows per rank")
    low = LowLatencyHandle((gpu.tensor("src"), gpu.tensor("ranges"), 1, 128, 4))
    low.routes = (low[0], low[1], gpu.tensor("slots"))
    gpu.run(lambda: ((gpu.tensor("rows"), None), handle, low, NothingToWaitFor(), None), [], None, True)
    recorded = [line for line in gpu.log if "used by" in line]
    names = ("rows", "routes", "rows per rank", "src", "ranges", "slots")
    assert recorded == [f"{name} used by caller" for name in names]
    assert handle._matrix is None


def test_each_other_stream_is_told_once(gpu: Gpu) -> None:
    low, other = LowLatencyHandle((gpu.tensor("src"), gpu.tensor("ranges"), 1, 128, 4)), Stream("other", gpu.log)
    low.routes = low[0]
    for stream in (gpu.beside, other, gpu.beside, other):
        with gpu.on(stream):
            low.use(GPU)
    assert gpu.log == ["src used by beside", "src used by other"]


def test_nothing_to_wait_for(gpu: Gpu) -> None:
    first, second = NothingToWaitFor(), NothingToWaitFor()
    assert isinstance(first, EventOverlap) and first.event is None and first.extra_tensors is None
    with first:
        pass
    first.current_stream_wait()
    assert gpu.log == []
    first.extra_tensors = (torch.zeros(1),)
    assert second.extra_tensors is None


def _plain_and_beside(rank: int, world: int) -> list[str]:
    """Calls on the caller's stream, and the same by way of the communication stream; the way is counted."""
    on, buffer, ways = use_deep_ep("cpu", rank), Buffer(dist.group.WORLD), []
    x, idx, weights = (t.to(on) for t in make_inputs(CASE, rank))
    run = buffer._exchanges.stream.run

    def counted(*arguments: Any) -> Any:
        ways.append(arguments)
        return run(*arguments)

    buffer._exchanges.stream.run = counted  # type: ignore[method-assign]

    def calls(**named: Any) -> list[Tensor]:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 4, **named)
        rows, got_idx, got_weights, sizes, handle, _ = buffer.dispatch(
            x, topk_idx=idx, topk_weights=weights, num_tokens_per_expert=per_expert, **named
        )
        again, *_ = buffer.dispatch(x, handle=handle, **named)
        by_rank, *_ = buffer.dispatch(x, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, **named)
        out, summed, _ = buffer.combine(rows, handle, topk_weights=got_weights, bias=x, **named)
        return [
            per_rank,
            per_expert,
            in_rank,
            rows,
            got_idx,
            got_weights,
            torch.tensor(sizes),
            again,
            by_rank,
            out,
            summed,
        ]

    def low_latency_calls(**named: Any) -> list[Tensor]:
        rows, counts, handle, *_ = buffer.low_latency_dispatch(x, idx, 16, 4, use_fp8=False, **named)
        out, *_ = buffer.low_latency_combine(torch.ones_like(rows), idx, weights, handle, **named)
        return [counts, out]

    wrong, expected = [], []
    for name, made, given, number in (
        ("plain", calls, {}, 1),  # by rank, which is seldom
        ("async", calls, {"async_finish": True}, 5),
        ("previous", calls, {"previous_event": Buffer.capture()}, 5),
        ("plain", low_latency_calls, {}, 0),
        ("async", low_latency_calls, {"async_finish": True}, 2),
    ):
        ways.clear()
        got = made(**given)
        wrong += [] if len(ways) == number else [f"{made.__name__} {name}: {len(ways)} on the communication stream"]
        if name == "plain":
            expected = got
        wrong += [] if all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) else [f"{name}: results"]
    return wrong


def test_calls_of_the_current_stream_take_no_other_way() -> None:
    assert run_ranks(2, _plain_and_beside) == [[], []]
