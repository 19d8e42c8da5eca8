"""How long exchanges take by the model: what moves, over the rate of what is busiest.

Normal mode is a pipeline whose stages run at the same time, so its slowest stage counts: network card, links of the
node, SMs that store, memory. Before it come the layout and, for FP8 between nodes, quantisation. Low-latency mode is a
fixed time and the bytes behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ep_moe.comm.communicator import RowLayout
from ep_moe.comm.sm_budget import busier_crew, overlapped, sms_to_keep_up
from ep_moe.plan.rates import Rates, microseconds
from ep_moe.plan.traffic import Traffic, row_bytes

LOW_LATENCY_BLOCKS = 264  # two on each of 132 SMs
_BF16_BYTES = 2

Limit = Literal["RDMA", "NVLink", "SMs", "memory"]


@dataclass(frozen=True)
class Exchange:
    """One dispatch or combine.

    Attributes:
        time: microseconds.
        limit: the slowest stage.
        sms: that it occupies.
        nvlink_bytes: into a rank.
        rdma_bytes: into a rank.
        messages: that a rank sends over RDMA.
        queue_pairs: that a rank needs for them: to each GPU that it sends to as many as
            its messages keep busy.
    """

    time: float
    limit: Limit
    sms: int
    nvlink_bytes: float
    rdma_bytes: float
    messages: float
    queue_pairs: int


def normal_dispatch(
    traffic: Traffic, rates: Rates, *, fp8: bool, layout: RowLayout = "expert_major", sms: int | None = None
) -> Exchange:
    """Dispatch in normal mode.

    Args:
        traffic: of a rank.
        rates: of the hardware.
        fp8: rows travel as FP8.
        layout: of what arrives.
        sms: SM budget; ``None`` for as many as keep up with the slowest other stage, as the library chooses them.
    """
    size = row_bytes(traffic.hidden, fp8)
    stored = size * (traffic.slots if layout == "expert_major" else traffic.rows)
    # Ranks of a node push rows to each other; what a GPU has for them from other nodes, where the network card stored
    # it, they pull. Either is written once before it is read.
    between_nodes = traffic.topology.nodes > 1
    written = traffic.rdma_rows if between_nodes else traffic.nvlink_rows
    tokens = traffic.tokens * (traffic.hidden * _BF16_BYTES)
    memory = size * (traffic.rows + written) + stored + (0 if between_nodes else tokens)
    link = rates.nvlink_pull if between_nodes else rates.nvlink_push
    stages: dict[Limit, float] = {
        "RDMA": microseconds(size * traffic.rdma_rows, rates.rdma),
        "NVLink": microseconds(size * traffic.nvlink_rows, link),
        "memory": microseconds(memory, rates.memory),
    }
    quantised = tokens + traffic.tokens * size if fp8 and between_nodes else 0
    before = rates.layout + microseconds(quantised, rates.memory)
    return _pipeline(traffic, rates, size, stages, before, stored, rates.store_per_sm, sms)


def normal_combine(traffic: Traffic, rates: Rates, *, sms: int | None = None) -> Exchange:
    """Combine in normal mode, from expert-major bf16 rows; arguments as :func:`normal_dispatch`."""
    size = row_bytes(traffic.hidden, fp8=False)
    memory = size * (traffic.slots + 2 * traffic.nvlink_rows + 2 * traffic.rdma_rows + traffic.tokens)
    wire = microseconds(size * traffic.nvlink_rows, rates.nvlink_push)
    in_memory = microseconds(memory, rates.memory)
    both = overlapped(wire, in_memory, rates.combine_interference)
    stages: dict[Limit, float] = {
        "RDMA": microseconds(size * traffic.rdma_rows, rates.rdma),
        "NVLink" if wire >= in_memory else "memory": both,
    }
    from_peers = traffic.nvlink_rows / traffic.rows if traffic.rows else 0.0
    crew = busier_crew(traffic.slots, traffic.nvlink_rows, float(traffic.tokens), from_peers)
    return _pipeline(traffic, rates, size, stages, 0.0, size * crew, rates.combine_per_crew, sms)


def low_latency_dispatch(traffic: Traffic, rates: Rates, *, fp8: bool) -> Exchange:
    """Dispatch in low-latency mode, in a CUDA graph."""
    return _low_latency(traffic, rates, row_bytes(traffic.hidden, fp8), rates.low_latency_dispatch)


def low_latency_combine(traffic: Traffic, rates: Rates) -> Exchange:
    """Combine in low-latency mode, in a CUDA graph; rows are bf16."""
    return _low_latency(traffic, rates, row_bytes(traffic.hidden, fp8=False), rates.low_latency_combine)


def experts_time(rows: float, local_experts: int, hidden: int, ffn: int, gated: bool, rates: Rates) -> float:
    """Microseconds of the forward GEMMs of a rank's experts in bf16: of operations or of reading the weights."""
    weights = (3 if gated else 2) * hidden * ffn
    operations = 2 * rows * weights / (rates.gemm * 1e6)
    return max(operations, microseconds(min(local_experts, rows) * weights * _BF16_BYTES, rates.memory))


def _pipeline(
    traffic: Traffic,
    rates: Rates,
    size: int,
    stages: dict[Limit, float],
    before: float,
    moved_by_sms: float,
    per_sm: float,
    sms: int | None,
) -> Exchange:
    if sms is None:
        sms = sms_to_keep_up(microseconds(moved_by_sms, per_sm), max(stages.values()))
    stages = stages | {"SMs": microseconds(moved_by_sms, per_sm * sms)}
    limit = max(stages, key=lambda name: stages[name])
    time = before + stages[limit] + (rates.rdma_latency if traffic.topology.nodes > 1 else 0.0)
    return _exchange(traffic, rates, size, time, limit, sms, traffic.topology.nodes - 1)


def _low_latency(traffic: Traffic, rates: Rates, size: int, fixed: float) -> Exchange:
    # One hop: a row goes to each of its ranks, whichever node that is on.
    ranks, near = traffic.topology.ranks, traffic.topology.ranks_per_node
    rows = traffic.rows
    traffic = replace(traffic, nvlink_rows=rows * (near - 1) / ranks, rdma_rows=rows * (ranks - near) / ranks)
    # A block serves its places, those of tokens that have an expert here, one after the other.
    places = math.ceil(max(traffic.rows, 1.0) / LOW_LATENCY_BLOCKS)
    stages: dict[Limit, float] = {
        "RDMA": microseconds(size * traffic.rdma_rows, rates.rdma),
        "NVLink": microseconds(size * traffic.nvlink_rows, rates.nvlink_push),
        "SMs": (places - 1) * rates.place,
    }
    limit = max(stages, key=lambda name: stages[name])
    time = fixed + stages[limit] + (rates.rdma_latency if traffic.topology.nodes > 1 else 0.0)
    blocks = min(LOW_LATENCY_BLOCKS, traffic.topology.ranks * traffic.tokens)
    return _exchange(traffic, rates, size, time, limit, math.ceil(blocks / 2), ranks - near)


def _exchange(traffic: Traffic, rates: Rates, size: int, time: float, limit: Limit, sms: int, others: int) -> Exchange:
    """``others``: GPUs that this one exchanges with over RDMA."""
    busy = traffic.rdma_rows / max(others, 1) / (rates.messages_per_qp * time)
    return Exchange(
        time=time,
        limit=limit,
        sms=sms,
        nvlink_bytes=size * traffic.nvlink_rows,
        rdma_bytes=size * traffic.rdma_rows,
        messages=traffic.rdma_rows,
        queue_pairs=others * max(math.ceil(busy), 1),
    )
