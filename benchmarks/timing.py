"""Times of calls that all ranks make: of the slowest rank, by CUDA events, medians over repeats."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from machine import Machine

REPEATS, WARM_UP = 20, 5
SHARED_REPEATS, SHARED_WARM_UP = 2, 1  # where times mean nothing
FLUSH_BYTES = 256 * 1024**2
HEAD_START_CYCLES = 400_000  # some 200 us, during which hosts launch what is timed

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Microseconds over repeats."""

    median: float
    least: float
    most: float


def time_call(call: Call, machine: Machine, *, calls: int = 1, flush: bool = False) -> Spread:
    """Time ``call`` on all ranks at once.

    Args:
        call: enqueues work on the current stream.
        machine: whose ranks call.
        calls: of what is measured that ``call`` makes; the time is divided by it.
        flush: write over the caches before each repeat.
    """
    scratch = torch.empty(FLUSH_BYTES if flush else 0, dtype=torch.uint8, device=machine.device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> list[float]:
        dist.barrier()
        scratch.fill_(1)
        meet(machine)
        start.record()
        call()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / calls]

    return spread_of(once, machine)[0]


def meet(machine: Machine) -> None:
    """A barrier of the GPUs, not of their hosts: what those launch next starts together, and finds no host to wait for.

    Ranks that share a GPU only meet on the hosts.
    """
    if machine.shared:
        dist.barrier()
        return
    torch.cuda._sleep(HEAD_START_CYCLES)
    dist.all_reduce(torch.zeros(1, device=machine.device))


def spread_of(measure: Callable[[], list[float]], machine: Machine) -> list[Spread]:
    """Repeat ``measure``, which returns milliseconds of several things; the slowest rank counts in each repeat."""
    repeats, warm_up = (SHARED_REPEATS, SHARED_WARM_UP) if machine.shared else (REPEATS, WARM_UP)
    rows = []
    for repeat in range(warm_up + repeats):
        slowest = torch.tensor(measure(), dtype=torch.float64, device=machine.device) * 1000.0
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if repeat >= warm_up:
            rows.append(slowest.tolist())
    return [Spread(statistics.median(column), min(column), max(column)) for column in zip(*rows, strict=True)]


def capture(call: Call, calls: int = 1) -> Call:
    """``calls`` times ``call`` in a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as that of NCCL which looks for errors, may go on.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        repeat(call, calls)
    return graph.replay


def repeat(call: Call, calls: int) -> None:
    """Call ``calls`` times."""
    for _ in range(calls):
        call()
