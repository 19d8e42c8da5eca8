"""What one exchange moves on each rank, on average: rows over every kind of link, bytes of memory, messages.

Normal mode and low-latency mode move the same rows: a token travels once to each node that has one of its experts, to
the GPU with the same index as its own, and from there once to each of that node's ranks that do. On one node only the
second hop is left. Combine is the way back, each rank and each node adding up before it sends.
"""

from __future__ import annotations

from dataclasses import dataclass

from ep_moe.comm.fp8 import BLOCK
from ep_moe.plan.routing import TokenSpread, Topology

_SCALE_BYTES, _BF16_BYTES = 4, 2


@dataclass(frozen=True)
class Traffic:
    """Rows that one rank sends and receives in one dispatch, or in the combine behind it.

    Attributes:
        topology: of the group.
        tokens: of each rank.
        hidden: channels.
        slots: expert-major rows that arrive.
        rows: that arrive, each once.
        nvlink_rows: of these, the ones another GPU of the node held.
        rdma_rows: that arrive from other nodes; each is one message.
    """

    topology: Topology
    tokens: int
    hidden: int
    slots: float
    rows: float
    nvlink_rows: float
    rdma_rows: float


def traffic_of(tokens: int, hidden: int, top_k: int, spread: TokenSpread, topology: Topology) -> Traffic:
    """The mean traffic of a rank whose group has ``tokens`` on every rank."""
    rows = tokens * spread.ranks
    return Traffic(
        topology=topology,
        tokens=tokens,
        hidden=hidden,
        slots=float(tokens * top_k),
        rows=rows,
        nvlink_rows=rows * (1 - 1 / topology.ranks_per_node),
        rdma_rows=tokens * spread.remote_nodes(topology),
    )


def row_bytes(hidden: int, fp8: bool) -> int:
    """Bytes of a row on its way: bf16, or e4m3 with an fp32 scale per 128 channels."""
    return hidden + hidden // BLOCK * _SCALE_BYTES if fp8 else hidden * _BF16_BYTES
