"""Normal mode: dispatch and combine of rows that arrive once each, over any communicator.

What travels with a row, scales, experts and weights, follows as a second tensor along the same routes: so it is the
same for every communicator, and everything arrives in the order of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ep_moe.comm import CapacityError, Communicator, Dispatched

Rows = Tensor | tuple[Tensor, Tensor]

_WORDS = 4  # columns of the second tensor come in multiples of this: rows of 16 bytes


@dataclass(frozen=True)
class Routes:
    """The routes of one dispatch.

    Attributes:
        communicator: that has them.
        handle: its name for them.
        num_rows: rows as the caller sees them.
        arrived_rows: rows of the communicator's tensors; another number with ``num_worst_tokens``.
        top_k: experts per token.
    """

    communicator: Communicator
    handle: Any
    num_rows: int
    arrived_rows: int
    top_k: int


@dataclass(frozen=True)
class Received:
    """What a dispatch brings; see ``Buffer.dispatch``.

    Attributes:
        rows: the rows, or rows and scales.
        topk_idx: int64 ``[rows, top_k]``, local expert or -1; ``None`` if only ranks were known.
        topk_weights: fp32 ``[rows, top_k]`` or ``None``.
        tokens_per_expert: of each local expert, padded to the alignment; empty if the host does not know.
        rank_prefix_matrix: int32 ``[ranks, ranks]``; column ``rank`` counts rows from ranks 0 to i, others hold -1.
        routes: for :func:`dispatch_cached` and :func:`combine`.
    """

    rows: Rows
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    tokens_per_expert: list[int]
    rank_prefix_matrix: Tensor
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
    # One place more, for entries that are not routed.
    owners = torch.where(topk_idx < 0, ranks, topk_idx // (num_experts // ranks))
    in_rank = torch.zeros(topk_idx.shape[0], ranks + 1, dtype=torch.bool, device=topk_idx.device)
    in_rank.scatter_(1, owners, True)
    in_rank = in_rank[:, :ranks].contiguous()
    experts = torch.where(topk_idx < 0, num_experts, topk_idx).flatten()
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)
    per_expert.scatter_add_(0, experts, torch.ones_like(experts, dtype=torch.int32))
    return in_rank.sum(0, dtype=torch.int32), per_expert[:num_experts], in_rank


class RowLimit:
    """Whether more rows arrived than a caller made room for, learnt without a wait of the host for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._missing = torch.zeros((), dtype=torch.int32, device=device)
        self._reported = torch.zeros((), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")

    def note(self, received: Tensor, allowed: int) -> None:
        """Report ``received`` rows (one element on the device), of ``allowed``."""
        torch.maximum(self._missing, (received - allowed).to(torch.int32), out=self._missing)
        self._reported.copy_(self._missing, non_blocking=True)

    def check(self) -> None:
        """Raise what has been reported so far, once.

        Raises:
            CapacityError: if rows did not fit.
        """
        missing = int(self._reported)
        if missing > 0:
            self._missing.zero_()
            self._reported.zero_()
            raise CapacityError(f"num_worst_tokens: {missing} rows more arrived; results of that dispatch lack them")


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
    limit: RowLimit,
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
        limit: told whether ``num_worst_tokens`` sufficed.

    Raises:
        ValueError: if arguments do not fit.
    """
    data, scales = _split(x)
    if topk_weights is not None and (topk_weights.dtype != torch.float32 or topk_weights.shape != topk_idx.shape):
        raise ValueError(
            f"topk_weights: expected torch.float32 {list(topk_idx.shape)} as topk_idx, "
            f"got {topk_weights.dtype} {list(topk_weights.shape)}"
        )
    local_experts, top_k = num_experts // communicator.size, topk_idx.shape[1]
    max_rows = None
    if num_worst_tokens:  # a row fills at most top_k slots, and each expert's padding some
        max_rows = num_worst_tokens * top_k + local_experts * (alignment - 1)
    arrived = communicator.dispatch(
        _movable(data),
        topk_idx,
        None,
        num_experts=num_experts,
        layout="rows",
        alignment=alignment,
        max_rows=max_rows,
        num_sms=num_sms,
    )
    rank = torch.full((data.shape[0], 1), communicator.rank, dtype=torch.int32, device=data.device)
    columns = [topk_idx.to(torch.int32), rank, *([] if topk_weights is None else [topk_weights])]
    columns += [] if scales is None else [_columns(scales)]
    companions = _dispatch_columns(communicator, arrived.handle, columns)
    num_rows = num_worst_tokens or arrived.rows.shape[0]
    rows, experts, source, *others = (_resize(tensor, num_rows) for tensor in (arrived.rows, *companions))
    local = experts - communicator.rank * local_experts
    mine = (local >= 0) & (local < local_experts)
    if num_worst_tokens:
        received = _received_rows(arrived)
        limit.note(received, num_worst_tokens)
        there = (torch.arange(num_rows, device=data.device) < received).unsqueeze(1)
        mine = mine & there
        source = torch.where(there, source, communicator.size)
    weights = None if topk_weights is None else others.pop(0).view(torch.float32)
    return Received(
        rows=_join(rows, x, others[0] if others else None),
        topk_idx=torch.where(mine, local, -1).to(torch.int64),
        topk_weights=None if weights is None else torch.where(mine, weights, 0.0),
        tokens_per_expert=[] if num_worst_tokens else list(arrived.segments.host_sizes()),
        rank_prefix_matrix=_rank_prefix_matrix(source, communicator),
        routes=Routes(communicator, arrived.handle, num_rows, arrived.rows.shape[0], top_k),
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
    limit: RowLimit,
) -> Received:
    """As :func:`dispatch`, of tokens whose ranks are known (bool ``[tokens, ranks]``) and whose experts are not.

    Raises:
        ValueError: if arguments do not fit.
    """
    data, _ = _split(x)
    expected = [data.shape[0], communicator.size]
    if is_token_in_rank is None or is_token_in_rank.dtype != torch.bool or list(is_token_in_rank.shape) != expected:
        raise ValueError(f"is_token_in_rank: expected torch.bool {expected} without topk_idx, got {is_token_in_rank}")
    # Routes depend on ranks alone: one expert a rank.
    ranks = torch.arange(communicator.size, dtype=torch.int64, device=data.device)
    named: dict[str, Any] = {"num_worst_tokens": num_worst_tokens, "num_sms": num_sms, "limit": limit}
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
    arrived_scales = None
    if scales is not None:
        (arrived_scales,) = _dispatch_columns(routes.communicator, routes.handle, [_columns(scales)])
        arrived_scales = _resize(arrived_scales, routes.num_rows)
    return _join(_resize(rows, routes.num_rows), x, arrived_scales)


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
    weights = None
    if topk_weights is not None:
        expected = [routes.num_rows, routes.top_k]
        if topk_weights.dtype != torch.float32 or list(topk_weights.shape) != expected:
            raise ValueError(
                f"topk_weights: expected torch.float32 {expected} as dispatched, "
                f"got {topk_weights.dtype} {list(topk_weights.shape)}"
            )
        weights = pad(topk_weights, (0, -routes.top_k % _WORDS))
    out = routes.communicator.combine(_resize(x, routes.arrived_rows), routes.handle, "rows")
    if weights is not None:
        weights = routes.communicator.combine(_resize(weights, routes.arrived_rows), routes.handle, "rows")
        weights = weights[:, : routes.top_k].contiguous()
    for index, tensor in enumerate(bias):
        if tensor.shape != out.shape:
            raise ValueError(f"bias: expected {list(out.shape)} in place {index}, got {list(tensor.shape)}")
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


def _join(rows: Tensor, like: Rows, scales: Tensor | None) -> Rows:
    """Rows in the dtype of ``like``, with scales in the dtype and rank of its scales."""
    data, like_scales = _split(like)
    rows = rows.view(data.dtype)
    if scales is None or like_scales is None:
        return rows
    scales = scales.contiguous().view(like_scales.dtype)
    return rows, scales.squeeze(1) if like_scales.dim() == 1 else scales


def _movable(data: Tensor) -> Tensor:
    """Rows of one byte an element as a dtype that every communicator moves without scales."""
    if data.element_size() != 1:
        return data
    if data.shape[1] % 2:
        raise ValueError(f"x: expected an even hidden size for {data.dtype}, got {data.shape[1]}")
    return data.contiguous().view(torch.bfloat16)


def _columns(scales: Tensor) -> Tensor:
    """Scales as ``[tokens, any]``."""
    return scales.unsqueeze(1) if scales.dim() == 1 else scales


def _dispatch_columns(communicator: Communicator, handle: Any, columns: list[Tensor]) -> list[Tensor]:
    """Send tensors ``[tokens, any]`` of four bytes an element side by side; they arrive as int32 views."""
    widths = [column.shape[1] for column in columns]
    total = -(-sum(widths) // _WORDS) * _WORDS
    packed = torch.zeros(columns[0].shape[0], total, dtype=torch.int32, device=columns[0].device)
    start = 0
    for column, width in zip(columns, widths, strict=True):
        packed[:, start : start + width] = column.contiguous().view(torch.int32)
        start += width
    # Bytes to a communicator, which knows floating point only.
    arrived = communicator.dispatch_cached(packed.view(torch.float32), handle, "rows").view(torch.int32)
    return list(arrived[:, :start].split(widths, dim=1))


def _resize(rows: Tensor, num_rows: int) -> Tensor:
    """The first ``num_rows`` rows, or zeros behind them."""
    missing = num_rows - rows.shape[0]
    if missing > 0:
        return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
    return rows[:num_rows] if missing < 0 else rows


def _received_rows(arrived: Dispatched) -> Tensor:
    """How many rows arrived, as one element on the device: every row has a slot."""
    slots = torch.arange(arrived.row_of_slot.shape[0], device=arrived.row_of_slot.device)
    return torch.where(slots < arrived.segments.ends[-1], arrived.row_of_slot, -1).amax() + 1


def _rank_prefix_matrix(source: Tensor, communicator: Communicator) -> Tensor:
    """See :class:`Received`; ``source`` is int32 ``[rows, 1]``, the rank that each row came from."""
    size, rank = communicator.size, communicator.rank
    matrix = torch.full((size, size), -1, dtype=torch.int32, device=source.device)
    ranks = torch.arange(size, dtype=torch.int32, device=source.device)
    matrix[:, rank] = (source <= ranks).sum(0, dtype=torch.int32)
    return matrix
