"""What the layer asks of a dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ep_moe.comm import ExpertSegments, PackedSegments
from ep_moe.comm.fp8_rows import QuantizedRows


@dataclass(frozen=True)
class DispatchedTokens:
    """Tokens at the rank of their experts, ready for a grouped GEMM.

    Attributes:
        rows: ``[segments.num_rows, hidden]`` in the dtype of the tokens; expert-major, padding rows zero. In FP8 where
            they travelled so and the experts take them. If the segments are packed: ``[local_experts, room, hidden]``,
            garbage behind the counts.
        weights: ``[segments.num_rows]`` routing weight of each row, 0 for padding; ``None`` if combine applies them.
        segments: which rows belong to which local expert.
        handle: names this exchange in ``combine`` and in cached dispatches; valid until the backward pass is done.
    """

    rows: Tensor | QuantizedRows
    weights: Tensor | None
    segments: ExpertSegments | PackedSegments
    handle: Any


class WeightGradients(Protocol):
    """Gradients that can be computed while those of a dispatch travel.

    Attributes:
        weights: the tensors whose gradients these are.
    """

    weights: tuple[Tensor, ...]

    def compute(self) -> Sequence[Tensor | None]:
        """Run on the current stream: the gradient of each weight, or ``None``."""
        ...


class TokenDispatcher(Protocol):
    """Turns routing decisions into expert-major rows and back, differentiably."""

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any = None,
        *,
        behind: WeightGradients | None = None,
    ) -> DispatchedTokens:
        """Bring tokens to their experts.

        Args:
            x: ``[tokens, hidden]``.
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
            topk_weights: ``[tokens, top_k]`` routing weights.
            handle: of an earlier dispatch with the same ``topk_idx``: its routes are reused, ``topk_idx`` is not read.
            behind: computed in the backward pass, while the gradients of tokens and routing weights travel on a stream
                of their own; by then the backward pass of the rows is done.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        ...

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Sum the rows of each token at its source: ``[num_rows, hidden]`` to ``[tokens, hidden]``."""
        ...

    def start_dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Callable[[], DispatchedTokens]:
        """Begin :meth:`dispatch`, for inference; others compute until the result is asked for.

        Returns:
            A function to call once; it gives the result for use on the current stream.

        Raises:
            RuntimeError: if a gradient would be needed.
        """
        ...

    def start_combine(self, rows: Tensor, handle: Any) -> Callable[[], Tensor]:
        """Begin :meth:`combine`, as :meth:`start_dispatch` begins a dispatch."""
        ...


def refuse_gradients(what: str, instead: str, *tensors: Tensor) -> None:
    """Raise ``RuntimeError`` if ``tensors`` ask for gradients of ``what``, which has no backward pass."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{what} computes no gradients: wrap the call in torch.no_grad(), or use {instead}")
