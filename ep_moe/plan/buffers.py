"""Symmetric memory that a rank needs: the layouts of ``csrc/include``, and what forwarding between nodes adds."""

from __future__ import annotations

from ep_moe.plan.routing import Topology
from ep_moe.plan.traffic import row_bytes

LOW_LATENCY_BUFFERS = 4
CHUNK_TOKENS, CHUNKS_IN_FLIGHT = 128, 2  # of each other node, in normal mode between nodes


def normal_buffer(topology: Topology, max_tokens: int, hidden: int) -> int:
    """Bytes for normal mode with rows of bf16 at most.

    A place for the rows of every rank, or two copies of those that come from other nodes, and a place for the sums of
    each other rank of the node; between nodes, chunks of rows and of sums from each other node. Routing and flags,
    under 1%, are left out.
    """
    size, ranks = row_bytes(hidden, fp8=False), topology.ranks_per_node
    here = ((2 if topology.nodes > 1 else ranks) + ranks - 1) * max_tokens
    forwarded = 2 * CHUNKS_IN_FLIGHT * CHUNK_TOKENS * (topology.nodes - 1)
    return (here + forwarded) * size


def low_latency_buffer(topology: Topology, max_tokens: int, hidden: int, top_k: int, fp8: bool) -> int:
    """Bytes for low-latency mode: every rank's tokens may arrive, and sums for every token, in four buffers.

    Between nodes also what is staged for puts: own rows, and for every rank routing, sums and weights.
    """
    routing = -(-top_k // 8) * 8 * 2
    rows = row_bytes(hidden, fp8) + 4 * top_k  # routing weights behind them
    sums = row_bytes(hidden, fp8=False)
    of_every_rank = topology.ranks * (routing + sums + 4 * top_k)
    landing = topology.ranks * rows + of_every_rank
    staging = rows + of_every_rank if topology.nodes > 1 else 0
    return LOW_LATENCY_BUFFERS * max_tokens * (landing + staging)
