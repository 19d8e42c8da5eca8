"""Low-latency mode: the handles and scales of DeepEP over a low-latency communicator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ep_moe.comm import LowLatencyCommunicator
from ep_moe.comm.fp8 import BLOCK
from ep_moe.comm.low_latency import Hook
from ep_moe.compat.deep_ep.events import UsedByStreams

Rows = Tensor | tuple[Tensor, Tensor]


class LowLatencyHandle(UsedByStreams, tuple[Tensor, Tensor, int, int, int]):
    """``(src_info, layout_range, max_tokens, hidden, num_experts)``, and what combine needs.

    Attributes:
        communicator: that has the routes.
        routes: its name for them.
        combine_rows: the tensor that experts were told to write to, if any.
    """

    communicator: LowLatencyCommunicator
    routes: Any
    combine_rows: Tensor | None = None

    def tensors(self) -> Any:
        """The routes, of which the first two of the tuple are parts."""
        return self.routes


def combine_buffer(handle: LowLatencyHandle) -> Tensor:
    """Where experts may write their rows, bf16 ``[local_experts, ranks * max_tokens, hidden]``; one for each handle."""
    if handle.combine_rows is None:
        handle.combine_rows = handle.communicator.combine_buffer(handle.routes)
    return handle.combine_rows


def unpack_scales(exponents: Tensor, hidden: int, receive: Hook | None) -> tuple[Tensor, Hook | None]:
    """UE8M0 exponents of rows ``[..., hidden]``, four to an int32, as fp32 scales, for programs that want these.

    Returns:
        Fp32 ``[..., hidden / 128]``, and what receives them, if ``receive`` has to be called for the exponents.
    """
    shape = (*exponents.shape[:2], hidden // BLOCK)
    scales = torch.empty(shape, dtype=torch.float32, device=exponents.device)
    if receive is None:
        _unpack(exponents, scales)
        return scales, None
    return scales, _receive_and_unpack(receive, exponents, scales)


def _unpack(exponents: Tensor, scales: Tensor) -> None:
    """Write UE8M0 exponents, four to an int32, as fp32 to ``scales``."""
    values = exponents.view(torch.uint8)[..., : scales.shape[-1]].to(torch.int32)
    scales.copy_((values << 23).view(torch.float32))  # the exponent field of an fp32 number


def _receive_and_unpack(receive: Hook, exponents: Tensor, scales: Tensor) -> Hook:
    def hook() -> None:
        receive()
        if scales.is_cuda:  # perhaps on another stream than the dispatch's
            scales.record_stream(torch.cuda.current_stream(scales.device))
        _unpack(exponents, scales)

    return hook
