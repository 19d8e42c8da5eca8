"""The contract between the floors: a communicator moves token rows between the ranks of a group.

A :class:`Communicator` works on plain tensors and knows nothing of autograd; the dispatcher above it pairs
each operation with its gradient (dispatch and combine are each other's transposes). Whatever moves the bytes,
the order of the rows is the same, so results are reproducible bit by bit, and one contract test suite serves every
implementation. Rows come in one of two layouts, the caller's choice:

- ``expert_major``: a row for every (token, local expert), called a slot; by local expert, then source rank, then token,
  then position among the token's top-k. Ready for any grouped GEMM.
- ``rows``: each received token once, by source rank, then token; with the row of every slot, for a grouped GEMM that
  gathers.

An exchange of expert-major rows can be had in steps, one for each of several groups of consecutive local experts (see
:func:`~ep_moe.comm.expert_groups.expert_groups`), so that experts compute while rows of others travel. A token arrives
with the first group that wants it, in all its slots, and leaves with the last: no row crosses twice and sums keep their
order, so results have the bits of the whole exchange. All ranks must ask for the same number of groups and take all
steps; a step runs on the stream that is current then, behind the steps before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.fp8 import BLOCK

RowLayout = Literal["expert_major", "rows"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)

SIGNATURE = ("hidden", "top_k", "dtype", "dtype of weights", "fp8")


class CapacityError(RuntimeError):
    """More rows arrived than ``max_rows``; the message says how many. Results of that dispatch lack rows."""


def too_many_rows(max_rows: int, needed: int, rank: int) -> CapacityError:
    """What is raised where ``needed`` rows arrived at ``rank``."""
    return CapacityError(f"max_rows = {max_rows} (moe.capacity_rows): {needed} rows arrived at rank {rank}")


@dataclass(frozen=True)
class ExpertSegments:
    """Where the rows of each local expert lie in an expert-major tensor.

    Attributes:
        counts: int64 ``[local_experts]`` on the device of the rows; real rows of each expert.
        ends: int32 ``[local_experts]`` on the device of the rows; the row after each expert's segment, padding
            included. This is the ``offs`` argument of grouped GEMMs.
        sizes: the length of each segment on the host, padding included; ``None`` if only the device knows.
        capacity: slots of the tensors, if that is not the sum of ``sizes``: those behind the last segment hold
            garbage.
        start: int32 ``[1]`` on the device, the first row of the first segment; ``None`` for row 0. Of some of the
            experts of a tensor, where only the device knows: slots before it belong to others.
    """

    counts: Tensor
    ends: Tensor
    sizes: tuple[int, ...] | None
    capacity: int | None = None
    start: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Slots of the tensors: those of all segments, padding included, or the capacity."""
        return sum(self.sizes or ()) if self.capacity is None else self.capacity

    @property
    def row_count(self) -> Tensor | None:
        """The end of the last segment, int32 ``[1]`` on the device; ``None`` where the host knows: then all slots."""
        return self.ends[-1:] if self.sizes is None else None

    def host_sizes(self) -> tuple[int, ...]:
        """Length of each segment on the host; waits for the device if that is not known yet."""
        if self.sizes is not None:
            return self.sizes
        ends = [0 if self.start is None else int(self.start), *self.ends.tolist()]
        return tuple(end - start for start, end in itertools.pairwise(ends))


@dataclass(frozen=True)
class ReceivedRouting:
    """The routing of received rows, as their source ranks gave it.

    Attributes:
        topk_idx: int64 ``[received, top_k]``, local expert, or -1 where the expert is elsewhere or there is no row.
        topk_weights: ``[received, top_k]``, 0 where ``topk_idx`` is -1; ``None`` if none were sent.
        rows_per_rank: int64 ``[ranks]``, rows from each rank.
    """

    topk_idx: Tensor
    topk_weights: Tensor | None
    rows_per_rank: Tensor


@dataclass(frozen=True)
class Dispatched:
    """What arrives at a rank.

    Attributes:
        rows: in the dtype that travelled; ``[segments.num_rows, hidden]`` in slots, padding zero, or
            ``[received, hidden]``, each once; with ``max_rows`` that many, those behind the last being garbage.
        scales: fp32 ``[rows, hidden / 128]`` when the rows are e4m3, otherwise ``None``.
        weights: ``[segments.num_rows]`` routing weight of each slot, 0 for padding; ``None`` if none were sent.
        segments: which slots belong to which local expert.
        row_of_slot: int32 ``[segments.num_rows]``, the row that belongs in each slot, -1 for padding; whatever the
            layout of ``rows``.
        handle: opaque to callers; names this exchange in ``dispatch_cached`` and ``combine``.
        routing: of each row, in the layout ``rows``; otherwise ``None``.
    """

    rows: Tensor
    scales: Tensor | None
    weights: Tensor | None
    segments: ExpertSegments
    row_of_slot: Tensor
    handle: Any
    routing: ReceivedRouting | None


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
        scales: Tensor | None = None,
        fp8: bool = False,
        layout: RowLayout = "expert_major",
        alignment: int = 1,
        max_rows: int | None = None,
        num_sms: int | None = None,
    ) -> Dispatched:
        """Send each token to the ranks of its experts.

        Args:
            x: ``[tokens, hidden]``; the number of tokens may differ between ranks and may be zero. With ``scales``:
                e4m3.
            topk_idx: int64 ``[tokens, top_k]``, global expert or -1 (not routed); an expert may be repeated.
            topk_weights: ``[tokens, top_k]`` routing weights, or ``None``.
            num_experts: experts over all ranks; rank ``r`` holds ``num_experts / size`` of them, starting at
                ``r * num_experts / size``.
            scales: fp32 ``[tokens, hidden / 128]``, of rows that are e4m3 already.
            fp8: quantise the rows to e4m3 with one fp32 scale per 128 channels and send those.
            layout: of the rows that arrive.
            alignment: every expert's segment is padded with zero rows to a multiple of this.
            max_rows: rows to make room for: slots, padding included, or, in the layout ``rows``, received rows. The
                host then need not learn the sizes, and waits for nothing; ``None`` makes exactly the room that is
                needed.
            num_sms: SMs on which rows of this exchange, and of later ones along its handle, are moved; ``None`` for
                the library's choice. Besides, routing takes up to 64 for the first 20 us, and sending rows 8 to 44.

        Raises:
            ValueError: before anything is sent, naming the argument, what was given and what is allowed.
            CapacityError: if ``max_rows`` did not suffice; by this call or by the next one.
        """
        ...

    def dispatch_in_groups(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        *,
        groups: int,
        num_experts: int,
        fp8: bool = False,
        alignment: int = 1,
        max_rows: int | None = None,
        num_sms: int | None = None,
    ) -> tuple[Dispatched, Iterator[None]]:
        """:meth:`dispatch` to expert-major rows in steps.

        No other dispatch of this communicator may come between the steps.

        Args:
            x: see :meth:`dispatch`, as for the others.
            topk_idx: likewise.
            topk_weights: likewise.
            groups: of the local experts.
            num_experts: likewise.
            fp8: likewise.
            alignment: likewise.
            max_rows: likewise.
            num_sms: likewise.

        Returns:
            What :meth:`dispatch` returns, with the rows of the first group, and ``groups - 1`` steps, each of which
            brings the rows (and scales) of the next group.

        Raises:
            ValueError: as :meth:`dispatch`, and unless every group has an expert.
            CapacityError: as :meth:`dispatch`.
        """
        ...

    def dispatch_cached(self, x: Tensor, handle: Any, layout: RowLayout = "expert_major") -> Tensor:
        """Send rows of ``x`` (``[tokens, hidden]``) along the routes of an earlier dispatch, in either layout."""
        ...

    def dispatch_cached_in_groups(self, x: Tensor, handle: Any, groups: int) -> tuple[Tensor, Iterator[None]]:
        """:meth:`dispatch_cached` to expert-major rows in steps; rows and steps as of :meth:`dispatch_in_groups`."""
        ...

    def dispatch_weights(self, topk_weights: Tensor, handle: Any) -> Tensor:
        """Send routing weights (``[tokens, top_k]``) along the routes of an earlier dispatch: ``[num_rows]``."""
        ...

    def combine(
        self, rows: Tensor, handle: Any, layout: RowLayout = "expert_major", *, behind_gemms: bool = False
    ) -> Tensor:
        """Sum the rows of each token at its source rank: ``[rows, hidden]`` in either layout to ``[tokens, hidden]``.

        The sum runs in fp32 (fp64 for fp64 rows): first over a rank's rows of the token in top-k order, rounded
        once to the dtype of ``rows``, then over the ranks in ascending order. Tokens routed nowhere receive zero.
        Over several nodes the sum of a node's ranks is rounded too, and the nodes are added in ascending order.

        Args:
            rows: as dispatched; those of padding are not read.
            handle: of the dispatch.
            layout: of ``rows``.
            behind_gemms: GEMMs that take several times as long run meanwhile. If the handle does not say how many SMs
                to use, it is then few, so that less is taken from those, instead of as many as make this fastest.
        """
        ...

    def combine_in_groups(self, rows: Tensor, handle: Any, groups: int) -> tuple[Tensor, Iterator[None]]:
        """:meth:`combine` from expert-major rows in steps.

        No other combine of this communicator may come between the steps.

        Args:
            rows: contiguous ``[num_rows, hidden]``; those of a group are read from its step on, not before.
            handle: of the dispatch.
            groups: of the local experts.

        Returns:
            ``[tokens, hidden]``, complete after the last step, and ``groups`` steps, each of which needs the rows of
            the next group.
        """
        ...

    def combine_weights(self, row_weights: Tensor, handle: Any) -> Tensor:
        """Bring one value per row (``[num_rows]``) back to ``[tokens, top_k]`` at the source rank.

        The transpose of how dispatch spreads routing weights: their gradient travels this way. Entries that
        were not routed receive zero.
        """
        ...

    def combine_received(self, values: Tensor, handle: Any) -> Tensor:
        """Sum top-k values of each received row at its token's rank.

        Args:
            values: fp32 ``[received rows, top_k]``, in the order of the layout ``rows``.
            handle: of the dispatch.

        Returns:
            fp32 ``[tokens, top_k]``, added over the ranks in ascending order; zero for tokens routed nowhere.
        """
        ...


def check_dispatch_shapes(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    num_experts: int,
    ranks: int,
    *,
    scales: Tensor | None,
    fp8: bool,
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
    if topk_weights is not None and (topk_weights.shape != topk_idx.shape or topk_weights.dtype not in _DTYPES):
        raise ValueError(
            f"topk_weights: expected floating point {list(topk_idx.shape)} as topk_idx, "
            f"got {topk_weights.dtype} {list(topk_weights.shape)}"
        )
    quantised = x.dtype == torch.float8_e4m3fn
    if quantised != (scales is not None) or (quantised and fp8):
        raise ValueError(
            "x: expected torch.float8_e4m3fn with scales, or another dtype without (and fp8 to quantise it); got "
            f"{x.dtype} {'without' if scales is None else 'with'} scales, fp8 {fp8}"
        )
    if scales is not None:
        expected = [x.shape[0], x.shape[1] // BLOCK]
        if x.shape[1] % BLOCK or scales.dtype != torch.float32 or list(scales.shape) != expected:
            raise ValueError(
                f"scales: expected torch.float32 {expected}, one per {BLOCK} channels of x {list(x.shape)}, "
                f"got {scales.dtype} {list(scales.shape)}"
            )
    for name, tensor in (("topk_idx", topk_idx), ("topk_weights", topk_weights), ("scales", scales)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {tensor.device}")


def check_options(layout: RowLayout, alignment: int, max_rows: int | None, num_sms: int | None) -> None:
    """Raise ``ValueError`` unless a dispatch can have these options."""
    if layout not in ("expert_major", "rows"):
        raise ValueError(f"layout: expected expert_major or rows, got {layout!r}")
    if alignment < 1:
        raise ValueError(f"alignment: expected at least 1, got {alignment}")
    if max_rows is not None and max_rows < 0:
        raise ValueError(f"max_rows: expected at least 0 (moe.capacity_rows), got {max_rows}")
    if num_sms is not None and num_sms < 1:
        raise ValueError(f"num_sms: expected at least 1 (phases.<phase>.num_sms), got {num_sms}")


def check_expert_range(topk_idx: Tensor, num_experts: int) -> None:
    """Raise ``ValueError`` unless all entries are experts or -1; waits for the device."""
    if topk_idx.numel():
        low, high = (int(v) for v in torch.aminmax(topk_idx))
        if low < -1 or high >= num_experts:
            raise ValueError(
                f"topk_idx: expected experts in [0, {num_experts}) (moe.num_experts) or -1, got {low} to {high}"
            )


def exchange_signature(x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, fp8: bool) -> list[int]:
    """What must be equal on all ranks for their messages to match, in the order of :data:`SIGNATURE`."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: expected one of {[str(d) for d in _DTYPES]}, got {x.dtype}")
    weights = -1 if topk_weights is None else _DTYPES.index(topk_weights.dtype)
    return [x.shape[1], topk_idx.shape[1], _DTYPES.index(x.dtype), weights, int(fp8)]


def check_signature(
    source: int, theirs: Sequence[int], rank: int, mine: Sequence[int], names: Sequence[str] = SIGNATURE
) -> None:
    """Raise ``ValueError`` unless the rank ``source`` passed what this ``rank`` did, integers called ``names``."""
    differing = [part for part in zip(names, theirs, mine, strict=True) if part[1] != part[2]]
    if differing:
        other = ", ".join(f"{name} {_named(name, value)}" for name, value, _ in differing)
        own = ", ".join(f"{name} {_named(name, value)}" for name, _, value in differing)
        raise ValueError(
            f"dispatch: rank {source} of the group passed {other}, rank {rank} {own}: all ranks must agree"
        )


def _named(name: str, value: int) -> str:
    """What stands for ``value`` of that name in a signature."""
    if name.startswith("dtype"):
        return "none" if value < 0 else str(_DTYPES[value])
    return str(bool(value)) if name == "fp8" else str(value)
