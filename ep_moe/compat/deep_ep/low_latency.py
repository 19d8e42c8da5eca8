"""Low-latency mode: the formats and handles of DeepEP over a low-latency communicator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ep_moe.comm import LowLatencyCommunicator
from ep_moe.comm.fp8 import BLOCK
from ep_moe.comm.low_latency import Hook, ScaleFormat
from ep_moe.compat.deep_ep.events import UsedByStreams
from ep_moe.native import stream_handle

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


Sent = tuple[Rows, Tensor, LowLatencyHandle, Hook | None]


def dispatch(
    communicator: LowLatencyCommunicator,
    x: Tensor,
    topk_idx: Tensor,
    received: Tensor | None,
    wait_ns: Tensor | None,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
    split: bool,
) -> Sent:
    """Bring each token to all its experts; with ``split`` only send, until the hook is called.

    Returns:
        The rows, or rows and scales; int32 ``[local_experts]``, rows of each expert; the handle for :func:`combine`;
        the hook that receives, if this only sent.

    Raises:
        ValueError: if arguments do not fit.
    """
    if use_ue8m0 and use_fp8 and not round_scale:
        raise ValueError("use_ue8m0: needs round_scale=True, UE8M0 scales being powers of two")
    scale_format: ScaleFormat = "none" if not use_fp8 else "ue8m0" if round_scale else "fp32"
    hook: Hook | None = None
    if split:
        packed, hook = communicator.dispatch_send(
            x, topk_idx, scale_format=scale_format, received=received, wait_ns=wait_ns
        )
    else:
        packed = communicator.dispatch(x, topk_idx, scale_format=scale_format, received=received, wait_ns=wait_ns)
    routes, rows, scales = packed.handle, packed.rows, packed.scales
    handle = LowLatencyHandle(
        (routes.source_token, routes.ranges, communicator.max_tokens, communicator.hidden, communicator.num_experts)
    )
    handle.communicator, handle.routes = communicator, routes
    if rows.is_cuda:
        handle.home = stream_handle(rows.device.index)
    if scales is None:
        return rows, packed.counts, handle, hook
    if round_scale and not use_ue8m0:
        exponents = scales
        shape = (*exponents.shape[:2], communicator.hidden // BLOCK)
        scales = torch.empty(shape, dtype=torch.float32, device=exponents.device)
        if hook is None:
            _unpack(exponents, scales)
        else:
            hook = _receive_and_unpack(hook, exponents, scales)
    return (rows, scales), packed.counts, handle, hook


def combine(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    handle: LowLatencyHandle,
    zero_copy: bool,
    out: Tensor | None,
    wait_ns: Tensor | None,
    split: bool,
) -> tuple[Tensor, Hook | None]:
    """Sum each token's rows, times their weights, at its rank; with ``split`` only send, until the hook is called.

    Raises:
        ValueError: if arguments do not fit.
    """
    if zero_copy:
        if handle.combine_rows is None:
            raise ValueError("zero_copy: call get_next_low_latency_combine_buffer(handle) first, and write there")
        x = handle.combine_rows
    if handle.home is not None:
        handle.use(handle.routes, x.device)
    communicator = handle.communicator
    if split:
        return communicator.combine_send(x, topk_idx, topk_weights, handle.routes, out=out, wait_ns=wait_ns)
    return communicator.combine(x, topk_idx, topk_weights, handle.routes, out=out, wait_ns=wait_ns), None


def combine_buffer(handle: LowLatencyHandle) -> Tensor:
    """Where experts may write their rows, bf16 ``[local_experts, ranks * max_tokens, hidden]``; one for each handle."""
    if handle.combine_rows is None:
        handle.combine_rows = handle.communicator.combine_buffer(handle.routes)
    return handle.combine_rows


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
