"""The contract between the floors: a communicator moves token rows between the ranks of a group.

A :class:`Communicator` works on plain tensors and knows nothing of autograd; the dispatcher above it pairs
each operation with its gradient (dispatch and combine are each other's transposes). Whatever moves the bytes,
the order of the rows is the same: by local expert, then source rank, then token, then position among the
token's top-k. So results are reproducible bit by bit, and one contract test suite serves every implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ExpertSegments:
    """Where the rows of each local expert lie in an expert-major tensor.

    Attributes:
        counts: int64 ``[local_experts]`` on the device of the rows; real rows of each expert.
        ends: int32 ``[local_experts]`` on the device of the rows; the row after each expert's segment, padding
            included. This is the ``offs`` argument of grouped GEMMs.
        sizes: the length of each segment on the host, padding included.
    """

    counts: Tensor
    ends: Tensor
    sizes: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all segments, padding included."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Dispatched:
    """What arrives at a rank.

    Attributes:
        rows: ``[segments.num_rows, hidden]`` in the dtype that travelled; padding rows are zero.
        scales: fp32 ``[segments.num_rows, hidden / 128]`` when the rows are e4m3, otherwise ``None``.
        weights: ``[segments.num_rows]`` routing weight of each row, 0 for padding; ``None`` if none were sent.
        segments: which rows belong to which local expert.
        handle: opaque to callers; names this exchange in ``dispatch_cached`` and ``combine``.
    """

    rows: Tensor
    scales: Tensor | None
    weights: Tensor | None
    segments: ExpertSegments
    handle: Any


class Communicator(Protocol):
    """Moves rows between ranks. All methods are collective over :attr:`group`."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        *,
        num_experts: int,
        fp8: bool = False,
        alignment: int = 1,
        num_sms: int | None = None,
    ) -> Dispatched:
        """Send each token to the ranks of its experts.

        Args:
            x: ``[tokens, hidden]``; the number of tokens may differ between ranks and may be zero.
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1 (not routed); an expert may be repeated.
            topk_weights: ``[tokens, top_k]`` routing weights, or ``None``.
            num_experts: experts over all ranks; rank ``r`` holds ``num_experts / size`` of them, starting at
                ``r * num_experts / size``.
            fp8: send the rows as e4m3 with one fp32 scale per 128 channels.
            alignment: every expert's segment is padded with zero rows to a multiple of this.
            num_sms: SMs that kernels of this exchange and of its handle may occupy; ``None`` for the library's choice.

        Raises:
            ValueError: before anything is sent, naming the argument, what was given and what is allowed.
        """
        ...

    def dispatch_cached(self, x: Tensor, handle: Any) -> Tensor:
        """Send rows of ``x`` (``[tokens, hidden]``) along the routes of an earlier dispatch; returns its row layout."""
        ...

    def dispatch_weights(self, topk_weights: Tensor, handle: Any) -> Tensor:
        """Send routing weights (``[tokens, top_k]``) along the routes of an earlier dispatch: ``[num_rows]``."""
        ...

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Sum the rows of each token at its source rank: ``[num_rows, hidden]`` to ``[tokens, hidden]``.

        The sum runs in fp32 (fp64 for fp64 rows): first over a rank's rows of the token in top-k order, rounded
        once to the dtype of ``rows``, then over the ranks in ascending order. Tokens routed nowhere receive zero.
        """
        ...

    def combine_weights(self, row_weights: Tensor, handle: Any) -> Tensor:
        """Bring one value per row (``[num_rows]``) back to ``[tokens, top_k]`` at the source rank.

        The transpose of how dispatch spreads routing weights: their gradient travels this way. Entries that
        were not routed receive zero.
        """
        ...


def check_dispatch_shapes(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, num_experts: int, ranks: int
) -> None:
    """Raise ``ValueError`` unless the arguments of a dispatch fit together; does not read values."""
    if num_experts < 1 or num_experts % ranks:
        raise ValueError(f"num_experts: expected a multiple of the {ranks} ranks of the group, got {num_experts}")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floating point [tokens, hidden], got {x.dtype} {list(x.shape)}")
    if topk_idx.dim() != 2 or topk_idx.shape[1] < 1 or topk_idx.dtype != torch.int64:
        raise ValueError(f"topk_idx: expected int64 [tokens, top_k >= 1], got {topk_idx.dtype} {list(topk_idx.shape)}")
    if topk_idx.shape[0] != x.shape[0]:
        raise ValueError(f"topk_idx: expected {x.shape[0]} tokens as in x, got {topk_idx.shape[0]}")
    if topk_weights is not None and topk_weights.shape != topk_idx.shape:
        raise ValueError(f"topk_weights: expected {list(topk_idx.shape)} as topk_idx, got {list(topk_weights.shape)}")
    for name, tensor in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {tensor.device}")


def check_expert_range(topk_idx: Tensor, num_experts: int) -> None:
    """Raise ``ValueError`` unless all entries are experts or -1; waits for the device."""
    if topk_idx.numel():
        low, high = (int(v) for v in torch.aminmax(topk_idx))
        if low < -1 or high >= num_experts:
            raise ValueError(
                f"topk_idx: expected experts in [0, {num_experts}) (moe.num_experts) or -1, got {low} to {high}"
            )
