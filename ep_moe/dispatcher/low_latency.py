"""Low-latency mode: fixed shapes and no wait of the host, for inference.

Tokens travel to packed buffers in which every expert has room for all tokens of all ranks. Experts that can, compute
there, in FP8 on rows in FP8, and write to the buffer that combine reads. Others get the real rows side by side: there
are at most ``top_k`` a token, so that they too cost what real rows cost, and a copy each way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.comm.fp8_rows import QuantizedRows, dequantize_rows
from ep_moe.comm.low_latency import LowLatencyCommunicator, PackedRows, PackedSegments, ScaleFormat
from ep_moe.dispatcher.dispatcher import DispatchedTokens, WeightGradients, refuse_gradients


@dataclass(frozen=True)
class LowLatencyHandle:
    """One exchange.

    Attributes:
        packed: the communicator's handle.
        places: int64 ``[segments.num_rows]``, the packed row of each expert-major row; behind the last real row, the
            number of packed rows. ``None`` if the experts work on the packed rows.
        topk_idx: as dispatched.
        segments: of the rows.
        dtype: of the tokens.
    """

    packed: Any
    places: Tensor | None
    topk_idx: Tensor
    segments: ExpertSegments | PackedSegments
    dtype: torch.dtype


class LowLatencyDispatcher:
    """A :class:`~ep_moe.dispatcher.dispatcher.TokenDispatcher` for decode; everything can be captured in a CUDA graph.

    Rows travel as bf16 whatever the dtype of the tokens, or as e4m3. Routing weights travel with them, and ``combine``
    applies them.
    """

    def __init__(
        self,
        communicator: LowLatencyCommunicator,
        *,
        fp8: bool = False,
        takes_packed_rows: Callable[[torch.dtype, torch.device], bool] = lambda dtype, device: False,
        takes_fp8_rows: Callable[[torch.dtype, torch.device], bool] = lambda dtype, device: False,
    ) -> None:
        """Dispatch over ``communicator``.

        Args:
            communicator: moves the rows.
            fp8: as e4m3 with a scale per 128 channels.
            takes_packed_rows: whether the experts take packed rows of a dtype on a device.
            takes_fp8_rows: whether they take packed rows in FP8 of tokens of a dtype on a device.
        """
        self.communicator = communicator
        self.fp8 = fp8
        self._takes_packed_rows = takes_packed_rows
        self._takes_fp8_rows = takes_fp8_rows

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any = None,
        *,
        behind: WeightGradients | None = None,
    ) -> DispatchedTokens:
        """See :meth:`ep_moe.dispatcher.dispatcher.TokenDispatcher.dispatch`.

        Returns:
            Rows without weights, packed or in segments whose sizes only the device knows.

        Raises:
            RuntimeError: if a gradient would be needed: there is none.
        """
        if handle is not None:
            raise ValueError("handle: low_latency mode has no cached dispatch")
        refuse_gradients("low_latency mode", "mode: normal", x, topk_weights)
        packed = self.communicator.dispatch(
            x.to(torch.bfloat16), topk_idx, topk_weights.float(), scale_format=self._scale_format
        )
        return self._unpack(packed, x.dtype, topk_idx)

    def combine(self, rows: Tensor, handle: LowLatencyHandle) -> Tensor:
        """See :meth:`ep_moe.dispatcher.dispatcher.TokenDispatcher.combine`; weighted, rounded to bf16."""
        packed = _pack(rows, handle)
        return self.communicator.combine(packed, handle.topk_idx, None, handle.packed).to(handle.dtype)

    def start_dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Callable[[], DispatchedTokens]:
        """See :meth:`ep_moe.dispatcher.dispatcher.TokenDispatcher.start_dispatch`; no SM is held meanwhile."""
        refuse_gradients("low_latency mode", "mode: normal", x, topk_weights)
        packed, receive = self.communicator.dispatch_send(
            x.to(torch.bfloat16), topk_idx, topk_weights.float(), scale_format=self._scale_format
        )

        def finish() -> DispatchedTokens:
            receive()
            return self._unpack(packed, x.dtype, topk_idx)

        return finish

    def start_combine(self, rows: Tensor, handle: LowLatencyHandle) -> Callable[[], Tensor]:
        """See :meth:`ep_moe.dispatcher.dispatcher.TokenDispatcher.start_combine`; no SM is held meanwhile."""
        out, receive = self.communicator.combine_send(_pack(rows, handle), handle.topk_idx, None, handle.packed)

        def finish() -> Tensor:
            receive()
            return out.to(handle.dtype)

        return finish

    @property
    def _scale_format(self) -> ScaleFormat:
        return "fp32" if self.fp8 else "none"

    def _unpack(self, packed: PackedRows, dtype: torch.dtype, topk_idx: Tensor) -> DispatchedTokens:
        """What the experts take: the packed buffers, or their real rows side by side."""
        device = packed.rows.device
        as_they_are = packed.scales is None or self._takes_fp8_rows(dtype, device)
        if as_they_are and dtype == torch.bfloat16 and self._takes_packed_rows(dtype, device):
            packed_segments = PackedSegments(packed.counts, self.communicator.combine_buffer(packed.handle))
            handle = LowLatencyHandle(packed.handle, None, topk_idx, packed_segments, dtype)
            rows: Tensor | QuantizedRows = packed.rows
            if packed.scales is not None:
                stand_in = packed.scales.new_empty((), dtype=dtype).expand(packed.rows.shape)
                rows = QuantizedRows(packed.rows, packed.scales, stand_in)
            return DispatchedTokens(rows, None, packed_segments, handle)
        local_experts, room, hidden = packed.rows.shape
        ends = packed.counts.cumsum(0, dtype=torch.int32)
        capacity = min(local_experts, topk_idx.shape[1]) * room
        slots = torch.arange(capacity, dtype=torch.int32, device=topk_idx.device)
        expert = torch.searchsorted(ends, slots, right=True)
        inside = slots - (ends - packed.counts)[expert.clamp(max=local_experts - 1)]
        places = torch.where(expert < local_experts, expert * room + inside, local_experts * room)
        readable = places.clamp(max=local_experts * room - 1)
        if packed.scales is None:
            rows = packed.rows.view(-1, hidden)[readable].to(dtype)
        else:
            # FP8 dtypes lack indexing; as bytes they move like any other.
            values = packed.rows.view(torch.uint8).view(-1, hidden)[readable].view(torch.float8_e4m3fn)
            rows = dequantize_rows(values, packed.scales.flatten(0, 1)[readable], dtype, ends[-1:])
        segments = ExpertSegments(packed.counts.to(torch.int64), ends, None, capacity)
        handle = LowLatencyHandle(packed.handle, places, topk_idx, segments, dtype)
        return DispatchedTokens(rows, None, segments, handle)


def _pack(rows: Tensor, handle: LowLatencyHandle) -> Tensor:
    """What combine reads; gathered rows go back to their places."""
    if handle.places is None:
        return rows
    local_experts, room = handle.packed.source_token.shape
    # One row more, for what lies behind the last real row.
    packed = torch.empty(local_experts * room + 1, rows.shape[1], dtype=torch.bfloat16, device=rows.device)
    packed[handle.places] = rows.to(torch.bfloat16)
    return packed[:-1].view(local_experts, room, -1)
