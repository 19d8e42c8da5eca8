"""Normal mode: dispatch and combine of rows that arrive once each, over any communicator.

Scales that a communicator would not send with the rows, because their dtype or number is another, follow as a second
tensor along the same routes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ep_moe.comm import Communicator
from ep_moe.comm.communicator import check_options
from ep_moe.comm.fp8 import BLOCK
from ep_moe.compat.deep_ep.normal_handle import NormalHandle
from ep_moe.native import stream_handle

Rows = Tensor | tuple[Tensor, Tensor]

_WORDS = 4  # columns of the second tensor come in multiples of this: rows of 16 bytes


# What a dispatch brings: the rows, or rows and scales; int64 [rows, top_k] local expert or -1, None if only ranks were
# known; fp32 [rows, top_k] weights or None; tokens of each local expert, padded to the alignment, empty if the host
# does not know; the handle for dispatch_cached and combine.
Received = tuple[Rows, Tensor | None, Tensor | None, list[int], NormalHandle]


def dispatch(
    communicator: Communicator,
    x: Rows,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    num_experts: int,
    alignment: int,
    num_worst_tokens: int,
    num_sms: int | None,
) -> Received:
    """Bring each token once to every rank that has an expert of it.

    Args:
        communicator: moves the rows, and checks what is not particular to this interface.
        x: ``[tokens, hidden]``, or such rows of one byte an element and their scales ``[tokens, any]`` or ``[tokens]``
            of four bytes an element.
        topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
        topk_weights: fp32 ``[tokens, top_k]`` or ``None``.
        num_experts: over all ranks.
        alignment: of the tokens of each local expert.
        num_worst_tokens: rows of the results, or 0 for those that arrive.
        num_sms: SMs to use, or ``None``.

    Raises:
        ValueError: if arguments do not fit.
        CapacityError: if more than ``num_worst_tokens`` rows arrived; by this call or by a later one.
    """
    if topk_weights is not None and topk_weights.dtype != torch.float32:
        raise ValueError(f"topk_weights: expected torch.float32, got {topk_weights.dtype}")
    data, scales = x if isinstance(x, tuple) else (x, None)
    moved, scales_beside, scales_behind = data, None, None
    if scales is not None and _travel_with_rows(data, scales):
        scales_beside = scales
    elif scales is not None or data.element_size() == 1:
        _check_rows(data, scales)
        moved, scales_behind = _movable(data), scales
    arrived = communicator.dispatch(
        moved,
        topk_idx,
        topk_weights,
        num_experts=num_experts,
        scales=scales_beside,
        layout="rows",
        alignment=alignment,
        max_rows=num_worst_tokens or None,
        num_sms=num_sms,
    )
    rows: Rows = arrived.rows
    handle, routing = NormalHandle((None, arrived.handle)), arrived.routing
    assert routing is not None
    handle.communicator, handle.routes, handle.num_rows = communicator, arrived.handle, arrived.rows.size(0)
    handle.sent, handle.rows_per_rank = topk_idx.shape, routing.rows_per_rank
    if data.is_cuda:
        handle.home = stream_handle(data.device.index)
    if scales_beside is not None:
        assert arrived.scales is not None
        rows = arrived.rows, arrived.scales
    elif moved is not data:
        behind = None if scales_behind is None else _dispatch_scales(communicator, arrived.handle, scales_behind)
        rows = _join(arrived.rows, behind, x)
    counts = [] if num_worst_tokens else list(arrived.segments.host_sizes())
    return rows, routing.topk_idx, routing.topk_weights, counts, handle


def dispatch_by_rank(
    communicator: Communicator,
    x: Rows,
    is_token_in_rank: Tensor | None,
    num_tokens_per_expert: Tensor,
    alignment: int,
    num_worst_tokens: int,
    num_sms: int | None,
) -> Received:
    """As :func:`dispatch`, of tokens whose ranks are known (bool ``[tokens, ranks]``) and whose experts are not.

    Raises:
        ValueError: if arguments do not fit.
    """
    data, scales = x if isinstance(x, tuple) else (x, None)
    _check_rows(data, scales)
    check_options("rows", alignment, num_worst_tokens, num_sms)
    if num_tokens_per_expert.dim() != 1 or num_tokens_per_expert.shape[0] % communicator.size:
        raise ValueError(
            "num_tokens_per_expert: expected [num_experts], a multiple of the "
            f"{communicator.size} ranks of the group, got {list(num_tokens_per_expert.shape)}"
        )
    expected = [data.shape[0], communicator.size]
    if is_token_in_rank is None or is_token_in_rank.dtype != torch.bool or list(is_token_in_rank.shape) != expected:
        given = "None" if is_token_in_rank is None else f"{is_token_in_rank.dtype} {list(is_token_in_rank.shape)}"
        raise ValueError(f"is_token_in_rank: expected torch.bool {expected} without topk_idx, got {given}")
    # Routes depend on ranks alone: one expert a rank.
    ranks = torch.arange(communicator.size, dtype=torch.int64, device=data.device)
    topk_idx = torch.where(is_token_in_rank, ranks, -1)
    rows, _, _, _, handle = dispatch(communicator, x, topk_idx, None, communicator.size, 1, num_worst_tokens, num_sms)
    counts = [] if num_worst_tokens else _tokens_per_expert(communicator, num_tokens_per_expert, alignment)
    return rows, None, None, counts, handle


def dispatch_cached(x: Rows, handle: NormalHandle) -> Rows:
    """Send ``x`` along the routes of an earlier dispatch: the same rows in the same order."""
    data, scales = x if isinstance(x, tuple) else (x, None)
    if handle.home is not None and handle.home != stream_handle(data.device.index):
        handle.use(data.device)
    if scales is None and data.element_size() != 1:
        return handle.communicator.dispatch_cached(data, handle.routes, "rows")
    _check_rows(data, scales)
    rows = handle.communicator.dispatch_cached(_movable(data), handle.routes, "rows")
    row_scales = None if scales is None else _dispatch_scales(handle.communicator, handle.routes, scales)
    return _join(rows, row_scales, x)


def combine(
    x: Tensor, handle: NormalHandle, topk_weights: Tensor | None, bias: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor | None]:
    """Sum rows ``[rows, hidden]``, and weights fp32 ``[rows, top_k]``, at their tokens' ranks.

    The sum is rounded to the dtype of ``x`` before ``bias`` (each ``[tokens, hidden]``) is added in fp32.

    Raises:
        ValueError: if shapes differ from those of the dispatch.
    """
    if x.dim() != 2 or x.shape[0] != handle.num_rows:
        raise ValueError(f"x: expected [{handle.num_rows}, hidden] as dispatched, got {list(x.shape)}")
    if topk_weights is not None:
        expected = [handle.num_rows, handle.sent[1]]
        if topk_weights.dtype != torch.float32 or list(topk_weights.shape) != expected:
            raise ValueError(
                f"topk_weights: expected torch.float32 {expected} as dispatched, "
                f"got {topk_weights.dtype} {list(topk_weights.shape)}"
            )
    if bias:
        _check_bias(bias, [handle.sent[0], x.shape[1]], x.device)
    if handle.home is not None and handle.home != stream_handle(x.device.index):
        handle.use(x.device)
    out = handle.communicator.combine(x, handle.routes, "rows")
    weights = None
    if topk_weights is not None:
        weights = handle.communicator.combine_received(topk_weights, handle.routes)
    if bias:
        accumulate = torch.promote_types(out.dtype, torch.float32)
        total = out.to(accumulate)
        for tensor in bias:
            total = total + tensor.to(accumulate)
        out = total.to(out.dtype)
    return out, weights


def make_room(communicator: Communicator, x: Tensor, tokens: int, num_experts: int, top_k: int) -> None:
    """Let a communicator that grows with the largest dispatch have room for ``tokens`` a rank, as ``x``; collective.

    With ``num_worst_tokens`` the host learns nothing, so nothing could grow when a larger batch comes.
    """
    rows = torch.zeros(tokens, x.shape[1], dtype=x.dtype, device=x.device)
    unrouted = torch.full((tokens, top_k), -1, dtype=torch.int64, device=x.device)
    communicator.dispatch(_movable(rows), unrouted, None, num_experts=num_experts, layout="rows")


def _tokens_per_expert(communicator: Communicator, num_tokens_per_expert: Tensor, alignment: int) -> list[int]:
    """Tokens of each local expert from what every rank sends to all experts (int32 ``[num_experts]``); collective."""
    on = torch.device("cpu") if dist.get_backend(communicator.group) == "gloo" else num_tokens_per_expert.device
    total = num_tokens_per_expert.to(device=on, dtype=torch.int64, copy=True)
    if communicator.size > 1:
        dist.all_reduce(total, group=communicator.group)
    local_experts = total.shape[0] // communicator.size
    counts = total[communicator.rank * local_experts :][:local_experts].tolist()
    return [-(-count // alignment) * alignment for count in counts]


def _check_rows(data: Tensor, scales: Tensor | None) -> None:
    if data.dim() != 2:
        raise ValueError(f"x: expected [tokens, hidden], got {list(data.shape)}")
    if scales is not None:
        fits = scales.dim() in (1, 2) and scales.shape[0] == data.shape[0] and scales.element_size() == 4
        if not fits or data.element_size() != 1:
            raise ValueError(
                "x: expected rows of one byte an element and scales [tokens, any] of four bytes an element, got "
                f"{data.dtype} {list(data.shape)} and {scales.dtype} {list(scales.shape)}"
            )


def _check_bias(bias: tuple[Tensor, ...], expected: list[int], device: torch.device) -> None:
    for index, tensor in enumerate(bias):
        if list(tensor.shape) != expected or tensor.device != device:
            raise ValueError(
                f"bias: expected {expected} on {device} in place {index}, got {list(tensor.shape)} on {tensor.device}"
            )


def _join(rows: Tensor, scales: Tensor | None, like: Rows) -> Rows:
    """Rows in the dtype of ``like``, with scales in the dtype and rank of its scales."""
    data, like_scales = like if isinstance(like, tuple) else (like, None)
    rows = _viewed(rows, data.dtype)
    if scales is None or like_scales is None:
        return rows
    scales = _viewed(scales, like_scales.dtype)
    return rows, scales.squeeze(1) if like_scales.dim() == 1 else scales


def _viewed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def _movable(data: Tensor) -> Tensor:
    """Rows of one byte an element as a dtype that every communicator moves without scales."""
    if data.element_size() != 1:
        return data
    if data.shape[1] % 2:
        raise ValueError(f"x: expected an even hidden size for {data.dtype}, got {data.shape[1]}")
    return data.contiguous().view(torch.bfloat16)


def _travel_with_rows(data: Tensor, scales: Tensor) -> bool:
    """Whether a communicator sends such scales in the rows."""
    if data.dtype != torch.float8_e4m3fn or scales.dtype != torch.float32 or data.dim() != 2:
        return False
    tokens, hidden = data.shape
    return hidden % BLOCK == 0 and scales.shape == (tokens, hidden // BLOCK)


def _dispatch_scales(communicator: Communicator, handle: Any, scales: Tensor) -> Tensor:
    """Send scales ``[tokens, any]`` or ``[tokens]`` along the routes of ``handle``: int32 ``[received, any]``."""
    columns = scales.unsqueeze(1) if scales.dim() == 1 else scales
    width = columns.shape[1]
    # Bits, as a dtype that every communicator moves, in rows of the size that kernels take.
    words = pad(columns.contiguous().view(torch.int32), (0, -width % _WORDS))
    arrived = communicator.dispatch_cached(words.view(torch.float32), handle, "rows")
    return arrived.view(torch.int32)[:, :width].contiguous()
