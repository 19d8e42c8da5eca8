"""What hardware and kernels reach: the constants of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ep_moe.comm.sm_budget import MEASURED
from ep_moe.config import ConfigError


@dataclass(frozen=True)
class Rates:
    """Rates in GB/s (1e9 bytes a second) into or out of one GPU with both directions busy, times in microseconds.

    The defaults were measured on two GPUs of one host, those of combine on H100 and the others on H200, but for those
    marked as assumed.

    Attributes:
        nvlink_pull: what kernels read from peers.
        nvlink_push: what kernels write to peers.
        rdma: into and out of a GPU's network card; assumed: 400 Gb/s, of which 90% carry rows.
        rdma_latency: a put and its flag, one way; assumed.
        messages_per_qp: messages a microsecond that a queue pair takes; assumed.
        memory: a large copy in HBM, reads and writes.
        store_per_sm: what one SM stores by bulk copies.
        combine_per_crew: what one of the two crews of an SM reads and writes in combine.
        combine_interference: how much of the shorter of wire and memory time adds to the longer in combine; fitted to
            the one time measured with 128 SMs.
        layout: until the first rows are at their places: launch, exchange of routing, every row's place.
        low_latency_dispatch: of one token, in a CUDA graph: launch and two latencies.
        low_latency_combine: likewise.
        place: each further (rank, token) place that a block of a low-latency kernel serves.
        gemm: TFLOP/s of grouped bf16 GEMMs.
    """

    nvlink_pull: float = MEASURED.pull
    nvlink_push: float = MEASURED.push
    rdma: float = 45.0
    rdma_latency: float = 5.0
    messages_per_qp: float = 2.0
    memory: float = MEASURED.memory
    store_per_sm: float = MEASURED.store_per_sm
    combine_per_crew: float = MEASURED.combine_per_crew
    combine_interference: float = MEASURED.combine_interference
    layout: float = 18.0
    low_latency_dispatch: float = 7.9
    low_latency_combine: float = 7.4
    place: float = 3.5
    gemm: float = 650.0


def rates_with(changes: Sequence[str]) -> Rates:
    """The defaults with changes such as ``"rdma=22.5"``.

    Raises:
        ConfigError: for what is not a rate, or not a positive number.
    """
    names = [field.name for field in dataclasses.fields(Rates)]
    values: dict[str, float] = {}
    for change in changes:
        name, _, text = change.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if name not in names or not value > 0.0:
            raise ConfigError(f"--rate {change}: expected NAME=NUMBER above 0, NAME one of {', '.join(names)}")
        values[name] = value
    return Rates(**values)


def microseconds(num_bytes: float, gb_per_s: float) -> float:
    """How long ``num_bytes`` take."""
    return num_bytes / (gb_per_s * 1e3)
