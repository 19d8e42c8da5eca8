"""How many SMs the exchanges of one node take where the configuration sets none.

Exchanges move a row over a link and, for every expert of a token, through memory. Links and memory have the same rate
however many SMs ask; what an SM moves is limited. So the more ranks there are, the more of a row's time is link time,
and the fewer SMs suffice. The rest of them is left to GEMMs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ep_moe.comm.communicator import RowLayout

SM_STEP, MOST_SMS = 8, 128
HEADROOM = 2.0
"""How much more than limits the exchange the SMs could move: stages that take equally long hinder each other."""
BEHIND_GEMMS = 0.5
"""The same behind GEMMs, where an exchange may take longer: SMs that never wait for a link cost GEMMs the least."""
PUSH_STEP, MOST_PUSH_SMS = 4, 44
"""SMs that push have no headroom: rows under way beyond what links take are in the way of what others move."""


@dataclass(frozen=True)
class KernelRates:
    """What kernels reach, in GB/s (1e9 bytes a second) of one GPU; measured on two GPUs of one host.

    Those of combine on H100, the others on H200.

    Attributes:
        pull: read from peers with both directions busy, as ranks of a node do what others got from another node.
        push: written to peers, likewise with both directions busy.
        memory: a large copy in HBM, reads and writes.
        store_per_sm: stored by the bulk copies of one SM in dispatch.
        quantize_per_sm: rows of e4m3 that one SM makes while it pushes, out of bf16.
        combine_per_crew: read and written in combine by half of an SM's warps: those that push sums to peers, or those
            that finish this rank's tokens.
        combine_interference: how much of the shorter of wire and memory time adds to the longer in combine; fitted to
            the one time measured with 128 SMs.
    """

    pull: float = 333.0
    push: float = 349.0
    memory: float = 4150.0
    store_per_sm: float = 57.0
    quantize_per_sm: float = 14.6
    combine_per_crew: float = 36.5
    combine_interference: float = 0.2


MEASURED = KernelRates()


def sms_to_keep_up(
    work_of_one_sm: float,
    longest_other: float,
    headroom: float = HEADROOM,
    *,
    step: int = SM_STEP,
    most: int = MOST_SMS,
) -> int:
    """SMs with which their part of an exchange takes less time than its slowest other part, by ``headroom``.

    Args:
        work_of_one_sm: time of the SMs' part on one of them.
        longest_other: time of that other part, in the same unit.
        headroom: how many times as much they could move.
        step: of which a multiple is returned, at least one.
        most: that are returned.
    """
    needed = headroom * work_of_one_sm / longest_other
    return min(max(math.ceil(needed / step), 1) * step, most)


def ranks_of_token(ranks: int, experts_per_rank: int, top_k: int) -> float:
    """Ranks that have an expert of a token, on average, if its ``top_k`` experts are drawn at random."""
    drawn = min(top_k, ranks * experts_per_rank)
    elsewhere = math.comb((ranks - 1) * experts_per_rank, drawn) / math.comb(ranks * experts_per_rank, drawn)
    return ranks * (1 - elsewhere)


@functools.cache
def dispatch_sms(ranks: int, experts_per_rank: int, top_k: int, layout: RowLayout) -> int:
    """SMs for a dispatch between ``ranks`` of one node; more experts a token store more, more ranks send more."""
    arriving = ranks_of_token(ranks, experts_per_rank, top_k)
    stored = top_k if layout == "expert_major" else arriving
    pushed = arriving * (1 - 1 / ranks)
    moved = 1 + pushed + arriving + stored  # rows read to be pushed, written by peers, read again, stored
    others = (pushed / MEASURED.push, moved / MEASURED.memory)
    return sms_to_keep_up(stored / MEASURED.store_per_sm, max(others))


@functools.cache
def push_sms(ranks: int, experts_per_rank: int, top_k: int, *, own: bool, quantize: bool) -> int:
    """SMs that push rows for a dispatch, besides its own; to the ranks of a node, and to the rank itself if ``own``."""
    arriving = ranks_of_token(ranks, experts_per_rank, top_k)
    pushed = arriving * (1 - 1 / ranks)
    stored = arriving if own else pushed
    others = (pushed / MEASURED.push, (1 + stored) / MEASURED.memory)
    work = max(stored / MEASURED.store_per_sm, 1 / MEASURED.quantize_per_sm if quantize else 0.0)
    return sms_to_keep_up(work, max(others), 1.0, step=PUSH_STEP, most=MOST_PUSH_SMS)


@functools.cache
def combine_sms(ranks: int, experts_per_rank: int, top_k: int, layout: RowLayout, *, behind_gemms: bool = False) -> int:
    """SMs for a combine between ``ranks`` of one node, which adds a rank's rows of a token and then the ranks' sums.

    ``behind_gemms`` is that of :meth:`ep_moe.comm.communicator.Communicator.combine`.
    """
    arriving = ranks_of_token(ranks, experts_per_rank, top_k)
    added = top_k if layout == "expert_major" else arriving
    pushed = arriving * (1 - 1 / ranks)
    crew = busier_crew(added, pushed, 1.0, 1 - 1 / ranks)
    wire, memory = pushed / MEASURED.push, (added + 2 * pushed + 1) / MEASURED.memory
    others = overlapped(wire, memory, MEASURED.combine_interference)
    return sms_to_keep_up(crew / MEASURED.combine_per_crew, others, BEHIND_GEMMS if behind_gemms else HEADROOM)


def busier_crew(added: float, pushed: float, finished: float, from_peers: float) -> float:
    """Rows that the busier crew of combine reads and writes; the crews are those of ``csrc/combine.cu``.

    Args:
        added: rows that this rank adds, of all tokens.
        pushed: sums that it pushes to peers, and that peers push to it.
        finished: tokens of this rank.
        from_peers: which part of the added rows is of peers' tokens.
    """
    return max(added * from_peers + pushed, added * (1 - from_peers) + pushed + finished)


def overlapped(wire: float, memory: float, interference: float) -> float:
    """Time of combine's two parts beside each other."""
    return max(wire, memory) + interference * min(wire, memory)
