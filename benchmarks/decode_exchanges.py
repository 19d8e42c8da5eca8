"""What a decode step can exchange tokens with: low-latency mode, normal mode, NCCL's all-to-all, DeepEP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ep_moe.comm import NvlinkCommunicator
from ep_moe.comm.low_latency import Hook, ScaleFormat
from ep_moe.comm.low_latency_reach import Reach, loopback_reach
from ep_moe.comm.nvlink_low_latency import NvlinkLowLatencyCommunicator
from ep_moe.comm.topology import Topology
from ep_moe.native import NativeLibraryError
from machine import Machine
from problem import Problem, row_bytes
from timing import Call

Send = Callable[[], Hook]


class SkippedError(RuntimeError):
    """An exchange cannot run here; the message says why."""


@dataclass(frozen=True)
class Exchange:
    """Both ways of one implementation; the sends return what receives, ``None`` where there is no such thing."""

    dispatch: Call
    combine: Call
    dispatch_send: Send | None = None
    combine_send: Send | None = None


def low_latency(
    machine: Machine, problem: Problem, max_tokens: int, fp8: bool, late: bool = False, nodes: str | None = None
) -> Exchange:
    """Our low-latency mode.

    Args:
        machine: whose ranks exchange.
        problem: what.
        max_tokens: room for them.
        fp8: rows travel as e4m3.
        late: routing weights travel with the sums; else with the rows, as a layer sends them.
        nodes: what carries rows if every GPU poses as a node of its own: ``loopback`` or ``nvshmem``.

    Raises:
        SkippedError: without NVSHMEM where it is asked for.
    """
    communicator = low_latency_communicator(machine, max_tokens, problem.hidden, problem.experts, nodes)
    scales: ScaleFormat = "fp32" if fp8 else "none"
    x, topk_idx = problem.x, problem.topk_idx
    with_rows, with_sums = (None, problem.topk_weights) if late else (problem.topk_weights, None)
    handle = communicator.dispatch(x, topk_idx, with_rows, scale_format=scales).handle
    rows = communicator.combine_buffer(handle).normal_()
    return Exchange(
        lambda: communicator.dispatch(x, topk_idx, with_rows, scale_format=scales),
        lambda: communicator.combine(rows, topk_idx, with_sums, handle),
        lambda: communicator.dispatch_send(x, topk_idx, with_rows, scale_format=scales)[1],
        lambda: communicator.combine_send(rows, topk_idx, with_sums, handle)[1],
    )


def normal(machine: Machine, problem: Problem, max_tokens: int, fp8: bool) -> Exchange:
    """Our normal mode with room for exactly what arrives, so that the host waits for nothing."""
    communicator = _normal_communicator(machine, max_tokens)
    room = max(problem.slots, 1)

    def dispatch() -> Any:
        return communicator.dispatch(
            problem.x, problem.topk_idx, problem.topk_weights, num_experts=problem.experts, fp8=fp8, max_rows=room
        )

    handle = dispatch().handle
    rows = torch.randn(room, problem.hidden, device=machine.device).bfloat16()
    return Exchange(dispatch, lambda: communicator.combine(rows, handle))


def nccl(machine: Machine, problem: Problem, max_tokens: int, fp8: bool) -> Exchange:
    """An all-to-all of fixed shape, as a decode step without the host needs: every token to every rank.

    Only the wire: neither quantisation nor placing nor adding rows is counted.
    """
    if machine.ranks == 1:
        raise SkippedError("one rank has nobody to exchange with")
    if machine.shared:
        raise SkippedError("NCCL refuses ranks that share a GPU")

    def all_to_all(bytes_per_row: int) -> Call:
        shape = (machine.ranks, problem.tokens, bytes_per_row)
        sent, arrived = (torch.zeros(shape, dtype=torch.uint8, device=machine.device) for _ in range(2))
        return lambda: dist.all_to_all_single(arrived, sent)

    return Exchange(all_to_all(row_bytes(problem.hidden, fp8)), all_to_all(row_bytes(problem.hidden, False)))


def deep_ep(machine: Machine, problem: Problem, max_tokens: int, fp8: bool) -> Exchange:
    """DeepEP's low-latency mode by its public interface, where it is installed."""
    if machine.shared:
        raise SkippedError("its ranks need a GPU each")
    buffer = _deep_ep_buffer(machine, max_tokens, problem.hidden, problem.experts)
    x, topk_idx, weights = problem.x, problem.topk_idx, problem.topk_weights

    def dispatch(hook: bool) -> Any:
        return buffer.low_latency_dispatch(x, topk_idx, max_tokens, problem.experts, use_fp8=fp8, return_recv_hook=hook)

    arrived, _, handle, _, _ = dispatch(False)
    shape = (arrived[0] if fp8 else arrived).shape
    rows = torch.randn(shape, device=machine.device, dtype=torch.bfloat16)

    def combine(hook: bool) -> Any:
        return buffer.low_latency_combine(rows, topk_idx, weights, handle, return_recv_hook=hook)

    return Exchange(
        lambda: dispatch(False), lambda: combine(False), lambda: dispatch(True)[4], lambda: combine(True)[2]
    )


EXCHANGES: dict[str, Callable[[Machine, Problem, int, bool], Exchange]] = {
    "low_latency": low_latency,
    "late_weights": functools.partial(low_latency, late=True),
    "loopback": functools.partial(low_latency, nodes="loopback"),
    "nvshmem": functools.partial(low_latency, nodes="nvshmem"),
    "normal": normal,
    "nccl": nccl,
    "deep_ep": deep_ep,
}


@functools.cache
def low_latency_communicator(
    machine: Machine, max_tokens: int, hidden: int, experts: int, nodes: str | None
) -> NvlinkLowLatencyCommunicator:
    """The one of these sizes; buffers are costly. ``nodes`` as of :func:`low_latency`."""
    return NvlinkLowLatencyCommunicator(
        machine.group,
        machine.device,
        max_tokens=max_tokens,
        hidden=hidden,
        num_experts=experts,
        reach=None if nodes is None else _reach_between_nodes(machine, nodes),
    )


def _reach_between_nodes(machine: Machine, nodes: str) -> Reach:
    topology = Topology(machine.ranks, 1)
    if nodes == "loopback":
        return loopback_reach(machine.group, topology, machine.device)
    from ep_moe.comm.nvshmem import nvshmem_reach

    try:
        return nvshmem_reach(machine.group, topology, machine.device)
    except NativeLibraryError as error:
        raise SkippedError(str(error)) from error


@functools.cache
def _normal_communicator(machine: Machine, max_tokens: int) -> NvlinkCommunicator:
    return NvlinkCommunicator(machine.group, machine.device, max_tokens=max_tokens)


@functools.cache
def _deep_ep_buffer(machine: Machine, max_tokens: int, hidden: int, experts: int) -> Any:
    try:
        from deep_ep import Buffer
    except (ImportError, OSError) as error:
        raise SkippedError(f"deep_ep cannot be imported: {error}") from error
    size = Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, machine.ranks, experts)
    return Buffer(machine.group, 0, size, low_latency_mode=True, num_qps_per_rank=experts // machine.ranks)
