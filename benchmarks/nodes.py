"""Two hops between GPUs of one host that pose as nodes, beside one hop: what overlapping the hops gains.

    python benchmarks/nodes.py --ranks 2 --ranks-per-node 1 --out results

Lines are those of ``benchmarks/normal.py``. `seq` is the same kernels one hop behind the other. Rows between "nodes"
travel over NVLink here, by our stores (loopback) or by NVSHMEM's, so times say how the stages overlap and nothing of a
network. Dispatch over nodes waits for the host, which learns sizes; `backward of combine` is a dispatch without.
`call to return` is the host's part of a dispatch on an idle GPU: its one wait, and what it does before and after.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_moe.comm import Communicator, NvlinkCommunicator
from ep_moe.comm.symmetric_transport import loopback_transport
from ep_moe.comm.topology import Topology, topology_of_group
from ep_moe.comm.transport import NodeTransport
from ep_moe.comm.two_hop import two_hop_communicator
from ep_moe.native import NativeLibraryError, open_nvshmem_library
from machine import Machine, add_ranks_argument, launch, measure_rates, say, start
from normal import Line, measure
from problem import Problem, make_problem
from results import save
from timing import spread_of


def main() -> None:
    """Measure one shape."""
    arguments = parse_arguments()
    launch(arguments.ranks)
    machine = start()
    topology = topology_of_group(machine.group, arguments.ranks_per_node)
    shape = {name: getattr(arguments, name) for name in ("tokens", "hidden", "top_k", "experts")}
    problem = make_problem(machine, **shape)
    rates = measure_rates(machine)
    say(f"{shape}; {topology.nodes} nodes of {topology.ranks_per_node}")
    lines: list[Line] = []
    for name, communicator in communicators(machine, topology, arguments.tokens):
        for fp8 in (False, True):
            lines += list(measure(name, communicator, problem, fp8, arguments.sms, rates, machine, []))
            lines.append(host_part(name, communicator, problem, fp8, arguments.sms, machine))
    save("nodes", arguments.out, machine, vars(arguments), lines, functools.partial(draw, lines))
    dist.barrier()
    dist.destroy_process_group()


def communicators(machine: Machine, topology: Topology, tokens: int) -> Iterator[tuple[str, Communicator]]:
    """One hop, then two by each transport; NVSHMEM where it is. One is gone when the next comes."""
    group, device, rank = machine.group, machine.device, dist.get_rank()
    ranks, node = topology.counterparts(rank), topology.node_of(rank)
    yield "one hop", NvlinkCommunicator(group, device, max_tokens=tokens)

    def here(members: dist.ProcessGroup) -> NvlinkCommunicator:
        return NvlinkCommunicator(members, device, max_tokens=topology.nodes * (tokens + 31))

    def loopback(counterparts: dist.ProcessGroup) -> NodeTransport:
        return loopback_transport(counterparts, ranks, device, timeout_s=30.0)

    def nvshmem(counterparts: dist.ProcessGroup) -> NodeTransport:
        from ep_moe.comm.nvshmem import nvshmem_transport

        return nvshmem_transport(group, ranks, node, device, timeout_s=30.0)

    transports = {"loopback": loopback}
    try:
        open_nvshmem_library()
        transports["nvshmem"] = nvshmem
    except NativeLibraryError as error:
        say(f"without NVSHMEM: {error}")
    for name, transport in transports.items():
        for overlap in (False, True):
            label = name if overlap else f"{name} seq"
            yield label, two_hop_communicator(group, topology, here, transport, overlap=overlap)
    if "nvshmem" in transports:
        from ep_moe.comm.nvshmem import shutdown

        shutdown()


def host_part(
    name: str, communicator: Communicator, problem: Problem, fp8: bool, sms: int | None, machine: Machine
) -> Line:
    """Time dispatches, each on an idle GPU, until the call returns."""

    def once() -> list[float]:
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        communicator.dispatch(
            problem.x, problem.topk_idx, problem.topk_weights, num_experts=problem.experts, fp8=fp8, num_sms=sms
        )
        return [(time.perf_counter() - start) * 1e3]

    times, what = spread_of(once, machine)[0], "dispatch, call to return"
    kind = f"{'fp8' if fp8 else 'bf16'} expert_major"
    say(f"{name:<12} {kind:<18} {sms or '':>4} {what:<28} {times.median:8.1f} {times.least:8.1f} {times.most:8.1f} us")
    return Line(name, kind, sms, what, times.median, times.least, times.most, 0.0)


def draw(lines: list[Line], pyplot: Any) -> Any:
    """A bar a communicator, a panel for each kind of rows and operation."""
    panels = list(dict.fromkeys((line.rows, line.what) for line in lines))
    figure, axes = pyplot.subplots(-(-len(panels) // 3), 3, figsize=(12, 2.6 * -(-len(panels) // 3)), squeeze=False)
    for axis, (rows, what) in zip(axes.flat, panels, strict=False):
        shown = [line for line in lines if (line.rows, line.what) == (rows, what)]
        axis.barh([line.communicator for line in shown], [line.median for line in shown])
        axis.invert_yaxis()
        axis.set(title=f"{what}\n{rows}", xlabel="us")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    return figure


def parse_arguments() -> argparse.Namespace:
    """The shape, and how many ranks pose as a node."""
    parser = argparse.ArgumentParser(description="Two hops between nodes that share a host.")
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sms", type=int, help="of the kernels of a node; default: the library's choice")
    parser.add_argument("--out", type=Path, help="folder for nodes.json and nodes.png")
    add_ranks_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
