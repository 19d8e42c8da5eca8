"""Which variant of the protocol to explore, and who has rows for whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Targets = frozenset[int]


@dataclass(frozen=True)
class Setup:
    """One variant of the protocol.

    Attributes:
        ranks: how many.
        in_flight: k, rounds sent and not received.
        row_buffers: B.
        table_buffers: T.
        targets: for each rank, the sets of ranks that it may have rows for: in a dispatch any of them in each round, in
            a combine one after the other in turn.
        rounds: of each rank; None for any number.
        kind: what a receiver knows. In a ``dispatch`` every block sends a packet and hears all packets before it takes
            rows. In a ``combine`` block 0 sends one, the last block hears them, and which rows come is known.
        packets: who sends packets: ``all`` ranks; in a combine also only those ``with rows`` for the receiver, or
            ``none``.
        weights: S waits for a word from each rank that it has rows for, and that rank's S writes it (combine only).
        tables: when they become free: ``cleared first`` or ``cleared after`` its own reads by the next receive,
            ``cleared in send``, or ``tagged`` with their round.
        table_lag: how many receives later they are cleared by a receive.
        any_order: receives of rounds in flight may come in any order.
        limit: what bounds rounds in flight: the ``oldest`` that is not received, or their ``count``.
        blocks: of each kernel.
        order: of blocks, see above.
        waits: phases that wait for the kernel ahead (order ``early`` only).
        starts_others_first: a kernel lets the next one start before it waits, not after.
        queue: kernels that run or wait at a time (orders ``block`` and ``early``).
        fused: one kernel runs both phases.
        lazy_clears: a clear takes effect at any time before the end of its kernel.
        mortal: a rank that may stop for ever at any step.
    """

    ranks: int = 2
    in_flight: int = 1
    row_buffers: int = 2
    table_buffers: int = 3
    targets: tuple[tuple[Targets, ...], ...] = ()
    rounds: int | None = None
    kind: Literal["dispatch", "combine"] = "dispatch"
    packets: Literal["all", "with rows", "none"] = "all"
    weights: bool = False
    tables: Literal["cleared first", "cleared after", "cleared in send", "tagged"] = "cleared after"
    table_lag: int = 1
    any_order: bool = False
    limit: Literal["oldest", "count"] = "oldest"
    blocks: int = 1
    order: Literal["stream", "events", "block", "early"] = "stream"
    waits: str = ""
    starts_others_first: bool = True
    queue: int = 3
    fused: bool = False
    lazy_clears: bool = False
    mortal: int | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            object.__setattr__(self, "targets", rows_for_all(self.ranks))
        assert len(self.targets) == self.ranks
        assert self.kind == "combine" or not (self.weights or self.packets != "all")
        assert self.kind == "dispatch" or len({len(choices) for choices in self.targets}) == 1

    @property
    def period(self) -> int:
        """After how many rounds the same rows come again, if that is known."""
        return len(self.targets[0]) if self.kind == "combine" else 1


def rows_for_all(ranks: int) -> tuple[tuple[Targets, ...], ...]:
    """Every rank has rows for every rank, in every round."""
    return ((frozenset(range(ranks)),),) * ranks


def rows_for_none(ranks: int) -> tuple[tuple[Targets, ...], ...]:
    """Nobody has rows for anybody."""
    return ((frozenset[int](),),) * ranks


def rows_for_some(ranks: int) -> tuple[tuple[Targets, ...], ...]:
    """In each round every rank has rows for any set of ranks: all patterns of tokens."""
    sets = [frozenset(j for j in range(ranks) if bits >> j & 1) for bits in range(1 << ranks)]
    return (tuple(sets),) * ranks


def rows_from_first(ranks: int) -> tuple[tuple[Targets, ...], ...]:
    """Only rank 0 has rows, for all others."""
    return ((frozenset(range(1, ranks)),), *(((frozenset[int](),),) * (ranks - 1)))
