"""The contract of low-latency mode: fixed shapes, sizes known to the device only, sending and receiving apart.

A :class:`LowLatencyCommunicator` brings each token to the ranks of its experts, where every expert has room for all
tokens of all ranks, and sums weighted rows back at the token's rank. For decoding: nothing depends on sizes that the
host would have to learn, so everything can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.fp8 import BLOCK

IN_FLIGHT = 2
MAX_TOP_K = 32
MAX_EXPERTS = 1024

ScaleFormat = Literal["none", "fp32", "ue8m0"]

Hook = Callable[[], None]


@dataclass(frozen=True)
class PackedRows:
    """What arrives at a rank.

    Attributes:
        rows: ``[local_experts, ranks * max_tokens, hidden]``, bf16 or e4m3. The rows of an expert are its first
            ``counts[expert]``, by source rank, then token; those behind hold garbage. A token that names an expert
            twice has one row there.
        scales: of e4m3 rows; fp32 ``[local_experts, ranks * max_tokens, hidden / 128]``, or int32 ``[..., hidden / 512
            rounded up]`` with the UE8M0 exponents of four blocks, lowest byte first. Otherwise ``None``.
        counts: int32 ``[local_experts]``.
        handle: names the exchange in ``combine``; has ``source_token``, int32 ``[local_experts, ranks * max_tokens]``,
            the token of each row at its rank, and ``ranges``, int64 ``[local_experts, ranks]``, the first row of each
            source rank << 32 | the number of its rows.
    """

    rows: Tensor
    scales: Tensor | None
    counts: Tensor
    handle: Any


@dataclass(frozen=True)
class PackedSegments:
    """Where the rows of each local expert lie in packed rows ``[local_experts, room, width]``: they are its first ones.

    Attributes:
        counts: int32 ``[local_experts]``, real rows; those behind them hold garbage.
        out: bf16 ``[local_experts, room, hidden]``, where the experts write; only real rows of it will be read.
    """

    counts: Tensor
    out: Tensor

    @property
    def room(self) -> int:
        """Rows from one expert's first to the next one's."""
        return self.out.shape[1]


class LowLatencyCommunicator(Protocol):
    """Moves rows between ranks in fixed shapes. All methods but the last three are collective over :attr:`group`.

    At most two dispatches, and two combines, may be under way (sent and not received) at a time, in any order.

    Attributes:
        max_tokens: most tokens of a rank.
        hidden: channels of a token, a multiple of 128.
        num_experts: over all ranks; rank ``r`` holds ``num_experts / size`` of them, from ``r * num_experts / size``.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    max_tokens: int
    hidden: int
    num_experts: int

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None = None,
        *,
        scale_format: ScaleFormat = "none",
        received: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> PackedRows:
        """Send each token to the ranks of its experts, and receive.

        Args:
            x: bf16 ``[tokens, hidden]``, at most ``max_tokens``, another number on each rank, also zero.
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
            topk_weights: fp32 ``[tokens, top_k]``, on all ranks or on none. They travel with the rows, and combine gets
                none: it then waits for one message of its peers, not for two.
            scale_format: ``none`` sends rows as they are; ``fp32`` as e4m3 with a scale per 128 channels, the largest
                magnitude (at least 1e-4) / 448; ``ue8m0`` with that scale rounded up to a power of two.
            received: int32 ``[local_experts]``; the counts are added, on the device.
            wait_ns: int64 ``[ranks]``; the time waited for each rank is added, on the device.

        Raises:
            ValueError: before anything is sent, naming the argument, what was given and what is allowed.
            PeerTimeoutError: if a rank did not come; by this call or a later one.
        """
        ...

    def dispatch_send(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None = None,
        *,
        scale_format: ScaleFormat = "none",
        received: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> tuple[PackedRows, Hook]:
        """As :meth:`dispatch`, but only send; the result is there once the hook has been called.

        The hook receives, on the stream that is current then; it may be called late and by another thread, once.

        Raises:
            RuntimeError: by the call, if the dispatch before the last has not been received; by the hook, if it is
                called twice.
        """
        ...

    def combine(
        self,
        rows: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        handle: Any,
        *,
        out: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> Tensor:
        """Sum each token's rows, times their weights, at its rank.

        In fp32: first over a rank's rows in top-k order, each multiplied, then added, and rounded to bf16; then over
        the ranks in ascending order, and rounded. A handle may be combined several times, or never.

        Args:
            rows: bf16 ``[local_experts, ranks * max_tokens, hidden]``, as dispatched; rows behind the counts are not
                read.
            topk_idx: as dispatched.
            topk_weights: fp32 ``[tokens, top_k]``; ``None`` if the dispatch got them.
            handle: of the dispatch.
            out: bf16 ``[tokens, hidden]`` to write to.
            wait_ns: int64 ``[ranks]``; the time waited for each rank is added, on the device.

        Returns:
            bf16 ``[tokens, hidden]``; 0 for tokens that are routed nowhere.

        Raises:
            ValueError, PeerTimeoutError: as :meth:`dispatch`.
        """
        ...

    def combine_send(
        self,
        rows: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        handle: Any,
        *,
        out: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> tuple[Tensor, Hook]:
        """As :meth:`combine`, but only send; see :meth:`dispatch_send`. ``rows`` are read by this call only."""
        ...

    def combine_buffer(self, handle: Any) -> Tensor:
        """A bf16 ``[local_experts, ranks * max_tokens, hidden]`` for experts to write to: combine copies nothing.

        A new one at every call, so that exchanges of several streams do not share it.
        """
        ...

    def mask_rank(self, rank: int, failed: bool = True) -> None:
        """Leave a rank out of exchanges, or let it take part again: what it would contribute is zero."""
        ...

    @property
    def masked(self) -> Tensor:
        """Bool ``[ranks]`` on the CPU: the ranks left out."""
        ...


def check_dispatch(
    communicator: LowLatencyCommunicator,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    scale_format: ScaleFormat,
    received: Tensor | None,
    wait_ns: Tensor | None,
) -> None:
    """Raise ``ValueError`` unless the arguments of a dispatch fit; does not read values."""
    hidden, most = communicator.hidden, communicator.max_tokens
    _check_tensor("x", x, torch.bfloat16, [None, hidden], x.device)
    if x.shape[0] > most:
        raise ValueError(f"x: {x.shape[0]} tokens exceed phases.decode.max_tokens_per_rank ({most})")
    _check_tensor("topk_idx", topk_idx, torch.int64, [x.shape[0], None], x.device)
    if scale_format not in ("none", "fp32", "ue8m0"):
        raise ValueError(f"scale_format: expected one of none, fp32, ue8m0, got {scale_format!r}")
    _check_top_k(topk_idx)
    if topk_weights is not None:
        _check_tensor("topk_weights", topk_weights, torch.float32, [*topk_idx.shape], x.device)
    if received is not None:
        local_experts = communicator.num_experts // communicator.size
        _check_tensor("received", received, torch.int32, [local_experts], x.device)
    if wait_ns is not None:
        _check_tensor("wait_ns", wait_ns, torch.int64, [communicator.size], x.device)


def check_combine(
    communicator: LowLatencyCommunicator,
    rows: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    handle: Any,
    out: Tensor | None,
    wait_ns: Tensor | None,
) -> None:
    """Raise ``ValueError`` unless the arguments of a combine fit; does not read values."""
    hidden, tokens, top_k = communicator.hidden, handle.tokens, handle.top_k
    _check_tensor("rows", rows, torch.bfloat16, [*handle.source_token.shape, hidden], rows.device)
    _check_tensor("topk_idx", topk_idx, torch.int64, [tokens, top_k], rows.device)
    if handle.weights is not None and topk_weights is not None:
        raise ValueError("topk_weights: expected None, for the dispatch got them and they have travelled")
    if handle.weights is None:
        if topk_weights is None:
            raise ValueError(
                f"topk_weights: expected torch.float32 [{tokens}, {top_k}], for the dispatch got none; got None"
            )
        _check_tensor("topk_weights", topk_weights, torch.float32, [tokens, top_k], rows.device)
    if out is not None:
        _check_tensor("out", out, torch.bfloat16, [tokens, hidden], rows.device)
        if not out.is_contiguous():
            raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    if wait_ns is not None:
        _check_tensor("wait_ns", wait_ns, torch.int64, [communicator.size], rows.device)


def check_sizes(max_tokens: int, hidden: int, num_experts: int, ranks: int) -> None:
    """Raise ``ValueError`` unless a communicator can have these sizes."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1 (phases.decode.max_tokens_per_rank), got {max_tokens}")
    if hidden < 1 or hidden % BLOCK:
        raise ValueError(f"hidden: expected a multiple of {BLOCK} (model.hidden_size), got {hidden}")
    if num_experts < 1 or num_experts % ranks or num_experts > MAX_EXPERTS:
        raise ValueError(
            f"num_experts: expected a multiple of the {ranks} ranks of the group, at most {MAX_EXPERTS} "
            f"(moe.num_experts), got {num_experts}"
        )


def check_other_rank(communicator: LowLatencyCommunicator, rank: int) -> None:
    """Raise ``ValueError`` unless ``rank`` is another one of the group."""
    if not 0 <= rank < communicator.size or rank == communicator.rank:
        raise ValueError(f"rank: expected another rank of the group of {communicator.size}, got {rank}")


def _check_top_k(topk_idx: Tensor) -> None:
    if not 1 <= topk_idx.shape[1] <= MAX_TOP_K:
        raise ValueError(f"topk_idx: expected a top_k of 1 to {MAX_TOP_K} (moe.top_k), got {topk_idx.shape[1]}")


def _check_tensor(name: str, x: Tensor, dtype: torch.dtype, shape: list[int | None], device: torch.device) -> None:
    fits = x.dtype == dtype and x.dim() == len(shape) and x.device == device
    for want, got in zip(shape, x.shape, strict=False):  # a loop, for all() takes as long as everything else here
        fits = fits and (want is None or want == got)
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name}: expected {dtype} [{wanted}] on {device}, got {x.dtype} {list(x.shape)} on {x.device}"
        )
