"""Normal mode: dispatch and combine of rows that arrive once each, over any communicator.

Scales that a communicator would not send with the rows, because their dtype or number is another, follow as a second
tensor along the same routes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ep_moe.comm import Communicator
from ep_moe.comm.fp8 import BLOCK
from ep_moe.compat.deep_ep import routing_counts
from ep_moe.compat.deep_ep.events import StreamsOfHandle

Rows = Tensor | tuple[Tensor, Tensor]

_WORDS = 4  # columns of the second tensor come in multiples of this: rows of 16 bytes


@dataclass(frozen=True)
class Routes:
    """The routes of one dispatch.

    Attributes:
        communicator: that has them.
        handle: its name for them.
        num_rows: rows of tensors here.
        tokens: that this rank dispatched.
        top_k: experts per token.
        streams: that its tensors have been used on.
    """

    communicator: Communicator
    handle: Any
    num_rows: int
    tokens: int
    top_k: int
    streams: StreamsOfHandle

    def use(self) -> None:
        """The current stream uses its tensors."""
        self.streams.add_current(self.handle)


@dataclass(frozen=True)
class Received:
    """What a dispatch brings; see ``Buffer.dispatch``.

    Attributes:
        rows: the rows, or rows and scales.
        topk_idx: int64 ``[rows, top_k]``, local expert or -1; ``None`` if only ranks were known.
        topk_weights: fp32 ``[rows, top_k]`` or ``None``.
        tokens_per_expert: of each local expert, padded to the alignment; empty if the host does not know.
        rows_per_rank: int64 ``[ranks]``, rows from each rank.
        routes: for :func:`dispatch_cached` and :func:`combine`.
    """

    rows: Rows
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    tokens_per_expert: list[int]
    rows_per_rank: Tensor
    routes: Routes


def dispatch_layout(topk_idx: Tensor, num_experts: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens per rank int32 ``[ranks]``, per expert int32 ``[num_experts]``, and bool ``[tokens, ranks]``.

    Raises:
        ValueError: if the arguments do not fit together.
    """
    if topk_idx.dim() != 2 or topk_idx.dtype != torch.int64:
        raise ValueError(f"topk_idx: expected int64 [tokens, top_k], got {topk_idx.dtype} {list(topk_idx.shape)}")
    if num_experts < 1 or num_experts % ranks:
        raise ValueError(f"num_experts: expected a multiple of the {ranks} ranks of the group, got {num_experts}")
    if routing_counts.usable(topk_idx):
        return routing_counts.count(topk_idx, num_experts, ranks)
    device = topk_idx.device
    owners = topk_idx.div(num_experts // ranks, rounding_mode="floor")  # -1 stays -1
    in_rank = (owners.unsqueeze(2) == torch.arange(ranks, device=device)).any(1)
    # One place more on both sides, for what is no expert; dispatch reports those behind the last.
    places = topk_idx.flatten().clamp(-1, num_experts) + 1
    per_expert = torch.zeros(num_experts + 2, dtype=torch.int32, device=device)
    per_expert.scatter_add_(0, places, torch.ones(1, dtype=torch.int32, device=device).expand_as(places))
    return in_rank.sum(0, dtype=torch.int32), per_expert[1:-1], in_rank


def dispatch(
    communicator: Communicator,
    x: Rows,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    *,
    num_experts: int,
    alignment: int,
    num_worst_tokens: int,
    num_sms: int | None,
) -> Received:
    """Bring each token once to every rank that has an expert of it.

    Args:
        communicator: moves the rows.
        x: ``[tokens, hidden]``, or such rows of one byte an element and their scales ``[tokens, any]`` or ``[tokens]``
            of four bytes an element.
        topk_idx: int64 ``[tokens, top_k]``, global expert or -1.
        topk_weights: fp32 ``[tokens, top_k]`` or ``None``.
        num_experts: over all ranks.
        alignment: of ``tokens_per_expert``.
        num_worst_tokens: rows of the results, or 0 for those that arrive.
        num_sms: SMs to use, or ``None``.

    Raises:
        ValueError: if arguments do not fit.
        CapacityError: if more than ``num_worst_tokens`` rows arrived; by this call or by a later one.
    """
    data, scales = _split(x)
    if topk_weights is not None and (topk_weights.dtype != torch.float32 or topk_weights.shape != topk_idx.shape):
        raise ValueError(
            f"topk_weights: expected torch.float32 {list(topk_idx.shape)} as topk_idx, "
            f"got {topk_weights.dtype} {list(topk_weights.shape)}"
        )
    with_rows = scales is not None and _travel_with_rows(data, scales)
    arrived = communicator.dispatch(
        data if with_rows else _movable(data),
        topk_idx,
        topk_weights,
        num_experts=num_experts,
        scales=scales if with_rows else None,
        layout="rows",
        alignment=alignment,
        max_rows=num_worst_tokens or None,
        num_sms=num_sms,
    )
    row_scales = arrived.scales
    if scales is not None and not with_rows:
        row_scales = _dispatch_scales(communicator, arrived.handle, scales)
    routing = arrived.routing
    assert routing is not None
    return Received(
        rows=_join(arrived.rows, row_scales, x),
        topk_idx=routing.topk_idx,
        topk_weights=routing.topk_weights,
        tokens_per_expert=[] if num_worst_tokens else list(arrived.segments.host_sizes()),
        rows_per_rank=routing.rows_per_rank,
        routes=Routes(
            communicator,
            arrived.handle,
            arrived.rows.shape[0],
            topk_idx.shape[0],
            topk_idx.shape[1],
            StreamsOfHandle(data.device),
        ),
    )


def dispatch_by_rank(
    communicator: Communicator,
    x: Rows,
    is_token_in_rank: Tensor | None,
    num_tokens_per_expert: Tensor,
    *,
    alignment: int,
    num_worst_tokens: int,
    num_sms: int | None,
) -> Received:
    """As :func:`dispatch`, of tokens whose ranks are known (bool ``[tokens, ranks]``) and whose experts are not.

    Raises:
        ValueError: if arguments do not fit.
    """
    data, _ = _split(x)
    expected = [data.shape[0], communicator.size]
    if is_token_in_rank is None or is_token_in_rank.dtype != torch.bool or list(is_token_in_rank.shape) != expected:
        given = "None" if is_token_in_rank is None else f"{is_token_in_rank.dtype} {list(is_token_in_rank.shape)}"
        raise ValueError(f"is_token_in_rank: expected torch.bool {expected} without topk_idx, got {given}")
    # Routes depend on ranks alone: one expert a rank.
    ranks = torch.arange(communicator.size, dtype=torch.int64, device=data.device)
    named: dict[str, Any] = {"num_worst_tokens": num_worst_tokens, "num_sms": num_sms}
    arrived = dispatch(
        communicator,
        x,
        torch.where(is_token_in_rank, ranks, -1),
        None,
        num_experts=communicator.size,
        alignment=1,
        **named,
    )
    counts = [] if num_worst_tokens else _tokens_per_expert(communicator, num_tokens_per_expert, alignment)
    return replace(arrived, topk_idx=None, tokens_per_expert=counts)


def dispatch_cached(x: Rows, routes: Routes) -> Rows:
    """Send ``x`` along the routes of an earlier dispatch: the same rows in the same order."""
    data, scales = _split(x)
    rows = routes.communicator.dispatch_cached(_movable(data), routes.handle, "rows")
    row_scales = None if scales is None else _dispatch_scales(routes.communicator, routes.handle, scales)
    return _join(rows, row_scales, x)


def combine(
    x: Tensor, routes: Routes, topk_weights: Tensor | None, bias: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor | None]:
    """Sum rows ``[rows, hidden]``, and weights fp32 ``[rows, top_k]``, at their tokens' ranks.

    The sum is rounded to the dtype of ``x`` before ``bias`` (each ``[tokens, hidden]``) is added in fp32.

    Raises:
        ValueError: if shapes differ from those of the dispatch.
    """
    if x.dim() != 2 or x.shape[0] != routes.num_rows:
        raise ValueError(f"x: expected [{routes.num_rows}, hidden] as dispatched, got {list(x.shape)}")
    if topk_weights is not None:
        expected = [routes.num_rows, routes.top_k]
        if topk_weights.dtype != torch.float32 or list(topk_weights.shape) != expected:
            raise ValueError(
                f"topk_weights: expected torch.float32 {expected} as dispatched, "
                f"got {topk_weights.dtype} {list(topk_weights.shape)}"
            )
    expected = [routes.tokens, x.shape[1]]
    for index, tensor in enumerate(bias):
        if list(tensor.shape) != expected or tensor.device != x.device:
            raise ValueError(
                f"bias: expected {expected} on {x.device} in place {index}, got {list(tensor.shape)} on {tensor.device}"
            )
    out = routes.communicator.combine(x, routes.handle, "rows")
    weights = None
    if topk_weights is not None:
        weights = routes.communicator.combine_received(topk_weights, routes.handle)
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


def _split(x: Rows) -> tuple[Tensor, Tensor | None]:
    data, scales = x if isinstance(x, tuple) else (x, None)
    if data.dim() != 2:
        raise ValueError(f"x: expected [tokens, hidden], got {list(data.shape)}")
    if scales is not None:
        fits = scales.dim() in (1, 2) and scales.shape[0] == data.shape[0] and scales.element_size() == 4
        if not fits or data.element_size() != 1:
            raise ValueError(
                "x: expected rows of one byte an element and scales [tokens, any] of four bytes an element, got "
                f"{data.dtype} {list(data.shape)} and {scales.dtype} {list(scales.shape)}"
            )
    return data, scales


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
    expected = [data.shape[0], data.shape[1] // BLOCK]
    whole = data.dtype == torch.float8_e4m3fn and data.shape[1] % BLOCK == 0
    return whole and scales.dtype == torch.float32 and list(scales.shape) == expected


def _dispatch_scales(communicator: Communicator, handle: Any, scales: Tensor) -> Tensor:
    """Send scales ``[tokens, any]`` or ``[tokens]`` along the routes of ``handle``: int32 ``[received, any]``."""
    columns = scales.unsqueeze(1) if scales.dim() == 1 else scales
    width = columns.shape[1]
    # Bits, as a dtype that every communicator moves, in rows of the size that kernels take.
    words = pad(columns.contiguous().view(torch.int32), (0, -width % _WORDS))
    arrived = communicator.dispatch_cached(words.view(torch.float32), handle, "rows")
    return arrived.view(torch.int32)[:, :width].contiguous()
