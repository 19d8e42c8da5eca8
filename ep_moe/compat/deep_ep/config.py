"""Tuning hints, and sizes that programs ask for before they make a buffer."""

from __future__ import annotations

from dataclasses import dataclass

from ep_moe.comm.low_latency import IN_FLIGHT, MAX_TOP_K

DEFAULT_NUM_SMS = 20
_RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Config:
    """Hints of how to communicate; only the number of SMs has a meaning here.

    Attributes:
        num_sms: SMs that kernels may occupy; 20, the default everywhere, leaves the choice to this library.
        num_max_nvl_chunked_send_tokens: ignored, but for size hints, as those below.
        num_max_nvl_chunked_recv_tokens: ignored.
        num_max_rdma_chunked_send_tokens: ignored.
        num_max_rdma_chunked_recv_tokens: ignored.
    """

    num_sms: int = DEFAULT_NUM_SMS
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        if self.num_sms < 1:
            raise ValueError(f"num_sms: expected at least 1, got {self.num_sms}")

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to ask a ``Buffer`` for; grows with both arguments. What a buffer takes does not depend on it."""
        return max(self.num_sms // 2, 1) * num_ranks * self.num_max_nvl_chunked_recv_tokens * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """The same for the network between nodes; 0 within one."""
        if num_ranks <= _RANKS_PER_NODE:
            return 0
        return max(self.num_sms // 2, 1) * num_ranks * self.num_max_rdma_chunked_recv_tokens * hidden_bytes


def low_latency_size_hint(max_tokens: int, hidden: int, ranks: int, num_experts: int) -> int:
    """Bytes of one rank's landing buffers in low-latency mode, roughly; 0 for no tokens.

    A bf16 row for every token of every rank, in each of the buffers that exchanges of both directions use in turn, and
    the routing of the tokens.
    """
    buffers = 2 * (IN_FLIGHT * 2 + 1)
    routing_bytes = 8 * min(num_experts, MAX_TOP_K)
    return buffers * ranks * max_tokens * (2 * hidden + routing_bytes)
