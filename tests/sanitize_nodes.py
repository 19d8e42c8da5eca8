"""A few exchanges over nodes on small shapes, for compute-sanitizer; ``tests/run_sanitizer.sh`` runs it under it.

Ranks share a GPU, two nodes of half of them each. Every result is compared with that of portable hops, bit by bit.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from communicators import rank_device
from ranks import run_ranks
from routing_cases import Case
from test_pipelined_hops import LAYOUTS, differing, everything, two_hops

from ep_moe.comm import PortableCommunicator
from ep_moe.comm.topology import Topology
from ep_moe.comm.transport import PortableTransport
from ep_moe.comm.two_hop import two_hop_communicator

ROUNDS = 3  # every part of the buffer is written again
TIMEOUT_S = 120.0


def check(rank: int, world: int, dtype: torch.dtype, fp8: bool) -> int:
    """The number of wrong tensors of this rank in several rounds, in both layouts."""
    device, wrong, group = rank_device("cuda", rank), 0, dist.group.WORLD
    assert group is not None
    topology = Topology(world, world // 2)
    ours = two_hops(topology, device, max_tokens=80, timeout_s=TIMEOUT_S)
    oracle = two_hop_communicator(group, topology, PortableCommunicator, PortableTransport)
    for seed in range(ROUNDS):
        tokens = tuple((37 * (seed + other)) % 81 for other in range(world))
        case = Case(tokens, num_experts=3 * world, top_k=3, hidden=256, pattern="some_unrouted", dtype=dtype, seed=seed)
        for layout in LAYOUTS:
            got, want = (everything(c, case, device, layout, fp8) for c in (ours, oracle))
            wrong += len(differing(got, want))
    return wrong


def main() -> None:
    """Rows as they are and quantised."""
    ranks = int(sys.argv[1])
    for dtype, fp8 in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        wrong = run_ranks(ranks, check, dtype, fp8)
        print(f"{ranks} ranks, {dtype}, fp8 {fp8}: wrong tensors {wrong}", flush=True)
        if any(wrong):
            sys.exit(1)


if __name__ == "__main__":
    main()
