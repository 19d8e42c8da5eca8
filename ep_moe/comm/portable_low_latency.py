"""The low-latency contract over ``torch.distributed`` alone: the oracle of the kernels, and what CPUs decode with.

Tokens, routing and weights go to all ranks, and every rank computes what it needs. Nothing is fast here. Results stay
NaN, and counts negative, until they are received, so that what reads them too early is found out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.communicator import check_expert_range, check_signature
from ep_moe.comm.fp8 import quantize_e4m3, quantize_e4m3_ue8m0
from ep_moe.comm.low_latency import (
    IN_FLIGHT,
    Hook,
    PackedRows,
    ScaleFormat,
    check_combine,
    check_dispatch,
    check_other_rank,
    check_sizes,
)

_SCALE_FORMATS: tuple[ScaleFormat, ...] = ("none", "fp32", "ue8m0")
_SIGNATURE = ("max_tokens", "hidden", "num_experts", "top_k", "weights", "scale_format")


@dataclass(frozen=True)
class PortableLowLatencyHandle:
    """The routes of one dispatch.

    Attributes:
        source_token: int32 ``[local_experts, ranks * max_tokens]``, the token of each row at its rank.
        ranges: int64 ``[local_experts, ranks]``, begin << 32 | count of each rank's rows.
        slots: int64 ``[ranks, max_tokens, top_k]``, the row of each arrived entry among all local ones, or -1.
        weights: fp32 ``[ranks, max_tokens, top_k]``, of entries that arrived, if they travelled with the rows.
        topk_idx: int64 ``[tokens, top_k]``, as dispatched.
    """

    source_token: Tensor
    ranges: Tensor
    slots: Tensor
    weights: Tensor | None
    topk_idx: Tensor

    @property
    def tokens(self) -> int:
        """Dispatched at this rank."""
        return self.topk_idx.shape[0]

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.topk_idx.shape[1]


class PortableLowLatencyCommunicator:
    """A :class:`~ep_moe.comm.low_latency.LowLatencyCommunicator` over collectives of a process group."""

    def __init__(self, group: dist.ProcessGroup, *, max_tokens: int, hidden: int, num_experts: int) -> None:
        """Prepare; arguments as the attributes of the contract.

        Raises:
            ValueError: for sizes that the contract does not allow.
        """
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        check_sizes(max_tokens, hidden, num_experts, self.size)
        self.max_tokens, self.hidden, self.num_experts = max_tokens, hidden, num_experts
        self.masked = torch.zeros(self.size, dtype=torch.bool, device="cpu")
        self._waiting: dict[str, list[int]] = {"dispatch": [], "combine": []}
        self._sent = {"dispatch": 0, "combine": 0}

    def mask_rank(self, rank: int, failed: bool = True) -> None:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.mask_rank`; the rank must still call."""
        check_other_rank(self, rank)
        self.masked[rank] = failed

    def combine_buffer(self, handle: PortableLowLatencyHandle) -> Tensor:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.combine_buffer`."""
        shape = (*handle.source_token.shape, self.hidden)
        return torch.empty(shape, dtype=torch.bfloat16, device=handle.source_token.device)

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
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.dispatch`; collectives do not say how long."""
        named = {"scale_format": scale_format, "received": received, "wait_ns": wait_ns}
        packed, hook = self.dispatch_send(x, topk_idx, topk_weights, **named)  # type: ignore[arg-type]
        hook()
        return packed

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
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.dispatch_send`."""
        check_dispatch(self, x, topk_idx, topk_weights, scale_format, received, wait_ns)
        check_expert_range(topk_idx, self.num_experts)
        self._agree(x, topk_idx.shape[1], topk_weights is not None, scale_format)
        begin = self._begin("dispatch")
        weighted = () if topk_weights is None else ((topk_weights, 0.0),)
        everyone, experts, *all_weights = self._gather((x, 0.0), (topk_idx, -1), *weighted)
        weights = all_weights[0] if all_weights else None
        experts[self.masked.to(experts.device)] = -1
        local_experts, places = self.num_experts // self.size, self.size * self.max_tokens
        first = self.rank * local_experts
        # [local experts, ranks * max_tokens]: whether a token has the expert, and how many before it have.
        numbers = torch.arange(first, first + local_experts, device=x.device)
        wanted = (experts.flatten(0, 1)[None] == numbers[:, None, None]).any(2)
        order = wanted.cumsum(1) - 1
        rows = [*_quantize(everyone.flatten(0, 1), scale_format)]
        counts = wanted.sum(1).to(torch.int32)
        by_rank = wanted.view(local_experts, self.size, self.max_tokens).sum(2)
        handle = PortableLowLatencyHandle(
            source_token=torch.full((local_experts, places), -1, dtype=torch.int32, device=x.device),
            ranges=(by_rank.cumsum(1) - by_rank) << 32 | by_rank,
            slots=torch.full_like(experts, -1),
            weights=None if weights is None else torch.full_like(weights, float("nan")),
            topk_idx=topk_idx,
        )
        expert, place = wanted.nonzero(as_tuple=True)
        target = expert * places + order[expert, place]
        handle.source_token.view(-1)[target] = (place % self.max_tokens).to(torch.int32)
        local = experts - first
        mine = (local >= 0) & (local < local_experts)
        number = torch.arange(places, device=x.device).view(self.size, self.max_tokens, 1)
        slots = local * places + order[local.clamp(0, local_experts - 1), number.expand_as(local)]
        handle.slots[mine] = slots[mine]
        packed = [t.new_full((local_experts * places, t.shape[1]), 0xFF) for t in rows]  # NaN in all formats
        out_counts = torch.full_like(counts, -1)

        def hook() -> None:
            self._end("dispatch", begin)
            for out, values in zip(packed, rows, strict=True):
                out[target] = values[place]
            out_counts.copy_(counts)
            if weights is not None:
                handle.weights[mine] = weights[mine]  # type: ignore[index]
            if received is not None:
                received.add_(counts)

        dtypes = [torch.bfloat16 if scale_format == "none" else torch.float8_e4m3fn]
        dtypes += {"none": [], "fp32": [torch.float32], "ue8m0": [torch.int32]}[scale_format]
        shaped = [t.view(dtype).view(local_experts, places, -1) for t, dtype in zip(packed, dtypes, strict=True)]
        return PackedRows(shaped[0], shaped[1] if len(shaped) > 1 else None, out_counts, handle), hook

    def combine(
        self,
        rows: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        handle: PortableLowLatencyHandle,
        *,
        out: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.combine`."""
        out, hook = self.combine_send(rows, topk_idx, topk_weights, handle, out=out, wait_ns=wait_ns)
        hook()
        return out

    def combine_send(
        self,
        rows: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        handle: PortableLowLatencyHandle,
        *,
        out: Tensor | None = None,
        wait_ns: Tensor | None = None,
    ) -> tuple[Tensor, Hook]:
        """See :meth:`ep_moe.comm.low_latency.LowLatencyCommunicator.combine_send`."""
        check_combine(self, rows, topk_idx, topk_weights, handle, out, wait_ns)
        begin = self._begin("combine")
        weights = handle.weights if topk_weights is None else self._gather((topk_weights, 0.0))[0]
        assert weights is not None  # one of them was given
        flat = rows.reshape(-1, self.hidden)
        partial = torch.zeros(self.size, self.max_tokens, self.hidden, dtype=torch.float32, device=rows.device)
        for k in range(handle.top_k):
            slots = handle.slots[..., k]
            there = slots >= 0
            partial[there] += weights[..., k][there][:, None] * flat[slots[there]].float()
        summed = torch.empty_like(partial, dtype=torch.bfloat16)
        self._all_to_all(summed, partial.to(torch.bfloat16))
        owners = torch.where(topk_idx < 0, -1, topk_idx // (self.num_experts // self.size))
        total = torch.zeros(handle.tokens, self.hidden, dtype=torch.float32, device=rows.device)
        for rank in range(self.size):
            if self.masked[rank]:
                continue
            there = (owners == rank).any(1)
            total[there] += summed[rank, : handle.tokens][there].float()
        if out is None:
            out = torch.empty(handle.tokens, self.hidden, dtype=torch.bfloat16, device=rows.device)
        result = out.fill_(float("nan"))

        def hook() -> None:
            self._end("combine", begin)
            result.copy_(total)

        return result, hook

    def _begin(self, what: str) -> int:
        self._sent[what] += 1
        number = self._sent[what]
        if any(other <= number - IN_FLIGHT for other in self._waiting[what]):
            self._sent[what] -= 1
            plural = {"dispatch": "dispatches", "combine": "combines"}[what]
            raise RuntimeError(
                f"{plural}: at most {IN_FLIGHT} may be under way; call the hook of the one before last first"
            )
        self._waiting[what].append(number)
        return number

    def _end(self, what: str, number: int) -> None:
        if number not in self._waiting[what]:
            raise RuntimeError(f"the hook of a {what} was called twice")
        self._waiting[what].remove(number)

    def _agree(self, x: Tensor, top_k: int, weighted: bool, scale_format: ScaleFormat) -> None:
        """Raise ``ValueError`` unless all ranks pass the same: back ends end the process where sizes differ."""
        sizes = [self.max_tokens, self.hidden, self.num_experts]
        mine = [*sizes, top_k, int(weighted), _SCALE_FORMATS.index(scale_format)]
        header = torch.tensor(mine, dtype=torch.int64, device=self._staging(x))
        everyone = header.new_empty(self.size, len(mine))
        dist.all_gather([*everyone], header, group=self.group)
        for rank, theirs in enumerate(everyone.tolist()):
            check_signature(rank, theirs, self.rank, mine, _SIGNATURE)

    def _gather(self, *parts: tuple[Tensor, float]) -> list[Tensor]:
        """``[ranks, max_tokens, width]`` of each ``[tokens, width]`` of every rank, padded with the values given."""
        on = self._staging(parts[0][0])
        padded = []
        for x, padding in parts:
            padded.append(torch.full((self.max_tokens, x.shape[1]), padding, dtype=x.dtype, device=on))
            padded[-1][: x.shape[0]] = x
        mine = [part.view(torch.uint8) for part in padded]
        together = torch.cat(mine, dim=1)
        everyone = together.new_empty(self.size, *together.shape)
        dist.all_gather([*everyone], together, group=self.group)
        gathered = everyone.split([part.shape[1] for part in mine], dim=2)
        # Cloned, for of one rank any strides count as contiguous, which a view as another dtype does not accept.
        whole = (rows.clone(memory_format=torch.contiguous_format) for rows in gathered)
        return [rows.view(x.dtype).to(x.device) for rows, (x, _) in zip(whole, parts, strict=True)]

    def _all_to_all(self, out: Tensor, x: Tensor) -> None:
        """Part ``r`` of ``x`` to rank ``r``."""
        on = self._staging(x)
        arrived = torch.empty_like(x, device=on)
        dist.all_to_all_single(arrived.view(torch.uint8), x.to(on).view(torch.uint8), group=self.group)
        out.copy_(arrived)

    def _staging(self, x: Tensor) -> torch.device:
        # gloo takes CPU tensors; several processes that share one GPU need it too.
        return torch.device("cpu") if dist.get_backend(self.group) == "gloo" else x.device


def _quantize(x: Tensor, scale_format: ScaleFormat) -> tuple[Tensor, ...]:
    """Rows, and scales if they have any, as bytes ``[rows, ...]``."""
    if scale_format == "none":
        return (x.view(torch.uint8),)
    values, scales = quantize_e4m3(x) if scale_format == "fp32" else quantize_e4m3_ue8m0(x)
    return values.view(torch.uint8), scales.view(torch.uint8)
