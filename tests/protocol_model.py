"""A model of the protocol of low-latency mode, small enough to look at every interleaving.

The protocol
============

Every rank owns landing buffers into which its peers write. Dispatch and combine have buffers of their own and count
rounds of their own, so one of them is modelled. A round has two phases: in the send S(n) a rank writes to its peers, in
the receive R(n) it reads what they wrote in their S(n). S(1), S(2), ... are launched in this order, R(n) after S(n),
and S(n) only when R(n - k) and all receives before it have been launched: k rounds are in flight.

*Who writes what.* S(n) of rank i writes to every rank j a packet, also when it has no rows for j, into place i of table
n mod T of j, and words of rows, if it has any for j, into place i of row buffer n mod B of j. Words become visible to j
one by one, in any order and at any later time; no fence orders them.

*Who reads what.* A word that has not been written holds a value that data never has: it is empty. R(n) of j waits until
the packets of all ranks are in table n mod T, learns from them which rows come, waits for every word of these in row
buffer n mod B, and empties each as it reads it. All blocks of a GPU read the table, so none can empty it while it reads
it. Two ways out: table n is cleared in the next receive (or send) that is launched, or its words carry their round, so
that what is left of an older round counts as empty and nothing is ever cleared.

*Why a buffer is free when it is written again.* Let rank i write in S(n + B) to rank j. Before, R(n + B - k) of i has
ended, which heard from all ranks, so j had started S(n + B - k). With B = 2k that is S(n + k), which j starts after its
R(n) has ended, where the words in question were read and emptied. Every link of the chain is needed: fewer buffers, a
rank that is silent when it has no rows, a bound on rounds in flight by their count (an old one may then wait for ever),
or a send that starts while a block of an earlier receive still runs, each break it. A table whose words carry their
round is free at the same time: T = 2k. One that the next receive clears is free one receive later: T = 2k + 1 if
receives come in order. If they come in any order, two rounds in flight may be received as R(n + 1), R(n), and only the
receive after that clears table n: T = 2k + 2. If the next send clears it, T = 2k + 1 in any order.

*Combine with weights.* There S(n) of a rank also asks its peers: it writes them the routing weights of its tokens, and
they wait for these before they write rows (the sums) in their S(n). A row is then written only after its reader has
started S(n), so after R(n - k) of the reader has ended: k row buffers do. The weights themselves are free once the rows
that they asked for have come, so such a combine needs no packets either.

*Why nobody waits for ever.* R(n) waits only for S(n) of its peers, which waits for nothing, or for weights that peers
write at the start of their S(n). If a rank dies, all others end up in a receive that waits for it, and those in the
earliest one wait for it alone. Others may have got further, up to k rounds: they wait for it, and for ranks that are
stuck behind it.

The model
=========

A state holds, for every rank, the kernels it runs with what their blocks have left to do, and the words that are not
empty. ``explore`` visits every state that can be reached and stops at the first violation:

- a word is written (visible) while its buffer still holds a word of an earlier round;
- a read returns a word of another round;
- a clear destroys a word that some reader has not read, or that belongs to another round;
- nobody can go on, although someone has not finished.

Nothing depends on the number of a round except its buffer, so states that differ by a shift of all rounds are the same
state. Without a bound on rounds the search therefore still ends, and what it shows holds for any number of rounds.

Reductions
==========

With ``every_step`` every single write, its arrival, every read and every clear is a step of its own, in all orders.
Without, these orders are left out (the tests check that both find the same):

1. *Words arrive when they are written, and writing to a word that is not free is already the violation.* Only rank i
   writes to place i, so a word that is free when it is written stays free until it arrives; and if it is not free, the
   word may arrive at once, onto the earlier one. A word that arrives late only delays readers, which the search does
   anyway by letting them be slow: they wait for words, and never act on the absence of one.
2. *Some steps are taken as soon as they can be, and no other is tried first*: writing to a free word, and taking a word
   of a row. They commute with all that others can do: the word has one writer and one reader, and neither step makes a
   word free. Two more are of this kind: reading a table whose clearing is ordered behind the whole receive, and
   launching a receive when nothing of the rank runs and nothing else can be launched.
3. *Clears come last, and together*: emptying words delays nobody, and makes the words free; so a violation that exists
   when some are cleared early exists when they are not. The clears by which a block may destroy what another has not
   read are taken at any time, but still together: those before the offending one can be put off until it. The same goes
   for reads of a table that race with its clearing, or that make it free by themselves.

Kernels and blocks
==================

``order`` says what is known when a block runs: ``"stream"``, all blocks of earlier kernels have ended; ``"events"``,
only R(n - k) and S(n - 1) have ended before S(n), and S(n) before R(n), as when receives run on other streams;
``"block"``, the same block of earlier kernels has ended; ``"early"``, all blocks of the kernel ahead have started, as
with programmatic dependent launch, and in the phases in ``waits`` the kernel ahead has ended (griddepcontrol.wait).
That a kernel has ended says nothing about the one ahead of it, unless it waited for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

Part = Literal["packet", "row", "weight"]
Verb = Literal["put", "arrive", "hear", "take", "wipe", "clear", "perform", "start", "launch", "die"]
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


class Word(NamedTuple):
    """A place in the landing buffers, but for the number of the buffer, which is that of the round."""

    owner: int
    part: Part
    writer: int
    place: int  # of a packet or weight: the writing block; of a row: the reading block


class Cell(NamedTuple):
    """A word that is not empty."""

    word: Word
    round: int
    rows: bool  # of a packet: the writer's rows come too


class Action(NamedTuple):
    """What a block has to do with a word of the round that is ``lag`` before that of its kernel."""

    verb: Verb
    word: Word
    lag: int = 0
    rows: bool = False


Stage = frozenset[Action]  # in any order


class Block(NamedTuple):
    """What a block has left to do, one stage after the other."""

    started: bool
    stages: tuple[Stage, ...]


class Kernel(NamedTuple):
    """A kernel that has been launched."""

    phases: str
    round: int
    blocks: tuple[Block, ...]
    unperformed: frozenset[Cell]  # cleared without effect yet

    @property
    def ended(self) -> bool:
        """Whether the kernel has nothing left to do."""
        return not self.unperformed and all(block.started and not block.stages for block in self.blocks)


class Rank(NamedTuple):
    """What the host of a rank has launched."""

    sent: int
    unreceived: tuple[int, ...]
    uncleared: tuple[int, ...]
    kernels: tuple[Kernel, ...]
    dead: bool


class State(NamedTuple):
    """Of all ranks."""

    ranks: tuple[Rank, ...]
    memory: frozenset[Cell]
    flying: frozenset[Cell]  # written and not visible; only with every step


class Event(NamedTuple):
    """One step, for people."""

    rank: int
    block: int
    kernel: str
    kernel_round: int
    verb: Verb
    word: Word | None = None
    round: int = 0


class Stuck(NamedTuple):
    """A rank that waits in vain."""

    rank: int
    round: int
    peers: frozenset[int]


@dataclass(frozen=True)
class Result:
    """What a search has found.

    Attributes:
        states: how many were visited.
        violation: the first one, or None.
        trace: the steps that lead to it.
        ends: who was stuck, of each state in which nobody could go on because a rank had died.
    """

    states: int
    violation: str | None
    trace: tuple[str, ...]
    ends: frozenset[frozenset[Stuck]]

    def __str__(self) -> str:
        if self.violation is None:
            return f"{self.states} states, no violation"
        return "\n".join((f"{self.violation}, found after {self.states} states:", *(f"  {s}" for s in self.trace)))


class Violation(Exception):
    """The protocol failed; ``what`` has a place for each of ``rounds``."""

    def __init__(self, events: list[Event], what: str, *rounds: int) -> None:
        super().__init__(what)
        self.what, self.rounds = what, rounds
        self.events = tuple(events)  # since the last state


Step = tuple[tuple[Event, ...], State]


def explore(setup: Setup, every_step: bool = False, most_states: int = 500_000) -> Result:
    """Visit all states breadth first, until a violation."""
    model = Model(setup, every_step)
    start = State((Rank(0, (), (), (), False),) * setup.ranks, frozenset(), frozenset())
    came_from: dict[State, tuple[State, tuple[Event, ...], int] | None] = {start: None}
    queue, ends = deque([start]), set[frozenset[Stuck]]()

    def found(state: State, violation: Violation) -> Result:
        steps, shifts = [violation.events], [0]
        while (origin := came_from[state]) is not None:
            state, events, shift = origin
            steps.append(events)
            shifts.append(shift)
        offset, all_events = 0, list[Event]()
        for events, shift in zip(reversed(steps), reversed(shifts), strict=True):
            all_events += [_shift_event(event, offset) for event in events]
            offset += shift
        what = violation.what.format(*(n + offset for n in violation.rounds))
        return Result(len(came_from), what, tuple(_describe(all_events, setup.blocks)), frozenset(ends))

    while queue:
        state = queue.popleft()
        try:
            any_step = False
            for events, following in model.steps(state):
                any_step = True
                base, following = _normalise(following, setup.period)
                if following not in came_from:
                    came_from[following] = (state, events, base)
                    queue.append(following)
                    if len(came_from) > most_states:
                        raise RuntimeError(f"more than {most_states} states")
            if not any_step:
                ends |= model.check_end(state)
        except Violation as violation:
            return found(state, violation)
    return Result(len(came_from), None, (), frozenset(ends))


def _normalise(state: State, period: int) -> tuple[int, State]:
    """The same state with rounds counted from one that all ranks have sent; and by how much they moved."""
    base = min(rank.sent for rank in state.ranks) // period * period
    if base == 0:
        return 0, state
    ranks = tuple(
        Rank(
            rank.sent - base,
            tuple(n - base for n in rank.unreceived),
            tuple(n - base for n in rank.uncleared),
            tuple(Kernel(k.phases, k.round - base, k.blocks, _shift_cells(k.unperformed, base)) for k in rank.kernels),
            rank.dead,
        )
        for rank in state.ranks
    )
    return base, State(ranks, _shift_cells(state.memory, base), _shift_cells(state.flying, base))


def _shift_cells(cells: frozenset[Cell], base: int) -> frozenset[Cell]:
    return frozenset(Cell(cell.word, cell.round - base, cell.rows) for cell in cells)


def _shift_event(event: Event, offset: int) -> Event:
    return event._replace(kernel_round=event.kernel_round + offset, round=event.round + offset)


def _describe(events: Iterable[Event], blocks: int) -> Iterator[str]:
    """Sentences; events that differ in their words only share one."""
    verbs: dict[Verb, str] = {
        "put": "writes its {part} to rank {peers}",
        "arrive": "has its {part} arrive at rank {peers}",
        "hear": "reads the {part} of rank {peers}",
        "take": "takes the {part} of rank {peers}",
        "wipe": "empties the {part} of rank {peers}",
        "clear": "clears the {part} of rank {peers}",
        "perform": "has cleared the {part} of rank {peers}",
        "start": "starts",
        "launch": "is launched",
        "die": "dies",
    }

    def key(event: Event) -> tuple[object, ...]:
        part = None if event.word is None else event.word.part
        return event.rank, event.block, event.kernel, event.kernel_round, event.verb, part, event.round

    for _, group in groupby(events, key):
        same = list(group)
        first = same[0]
        who = f"rank {first.rank}"
        if first.kernel:
            who += f", {first.kernel}({first.kernel_round})"
        if blocks > 1 and first.verb not in ("launch", "perform", "die"):
            who += f", block {first.block}"
        outgoing = first.verb in ("put", "arrive")
        words = [event.word for event in same if event.word is not None]
        peers = sorted({word.owner if outgoing else word.writer for word in words})
        part = f"round {first.round} {words[0].part}" if words else ""
        yield f"{who}: " + verbs[first.verb].format(part=part, peers=" and ".join(map(str, peers)))


class Model:
    """The steps from a state."""

    def __init__(self, setup: Setup, every_step: bool) -> None:
        self.setup = setup
        self.every_step = every_step
        self.buffers: dict[Part, int] = {
            "packet": setup.table_buffers,
            "row": setup.row_buffers,
            "weight": setup.row_buffers,
        }
        self.tagged = setup.tables == "tagged"
        # A receive's reads of the table and the clear of it are kernels that follow one another.
        self.clears_follow_reads = not self.tagged and setup.order == "stream"

    # What blocks do.

    def _targets(self, rank: int, number: int) -> Targets:
        """Whom a rank has rows for in a combine."""
        return self.setup.targets[rank][number % self.setup.period]

    def _packet_senders(self) -> range:
        """Blocks that send packets."""
        return range(self.setup.blocks if self.setup.kind == "dispatch" else 1)

    def _heard(self, owner: int, number: int) -> list[Word]:
        """The packets of a round."""
        return [
            Word(owner, "packet", writer, block)
            for writer in range(self.setup.ranks)
            for block in self._packet_senders()
            if self._sends_packet(owner in self._targets(writer, number))
        ]

    def _sends_packet(self, has_rows: bool) -> bool:
        return self.setup.packets == "all" or (self.setup.packets == "with rows" and has_rows)

    def _sender_of_row(self, reading_block: int) -> int:
        """The block that sends what the block of this number reads: another one, if there is."""
        return (reading_block + 1) % self.setup.blocks

    def send_stages(self, rank: int, block: int, number: int, targets: Targets, clears: Stage) -> list[Stage]:
        setup = self.setup
        packets = [
            Action("put", Word(peer, "packet", rank, block), rows=peer in targets)
            for peer in range(setup.ranks)
            if block in self._packet_senders() and self._sends_packet(peer in targets)
        ]
        rows = [
            Action("put", Word(peer, "row", rank, reader))
            for peer in targets
            for reader in range(setup.blocks)
            if self._sender_of_row(reader) == block
        ]
        if not setup.weights:
            return [frozenset([*packets, *rows]) | clears]
        askers = [peer for peer in range(setup.ranks) if rank in self._targets(peer, number)]
        asked = [Action("put", Word(peer, "weight", rank, self._sender_of_row(block))) for peer in askers]
        awaited = [Action("take", Word(rank, "weight", peer, block)) for peer in targets]
        return [frozenset([*packets, *asked]) | clears, frozenset(awaited), frozenset(rows)]

    def _receive_stages(self, rank: int, block: int, number: int, clears: Stage) -> list[Stage]:
        setup = self.setup
        if setup.kind == "combine":
            hears = [Action("hear", word) for word in self._heard(rank, number) if block == setup.blocks - 1]
            writers = [writer for writer in range(setup.ranks) if rank in self._targets(writer, number)]
            takes = [Action("take", Word(rank, "row", writer, block)) for writer in writers]
            reads: list[Stage] = [frozenset([*hears, *takes])]
        else:
            reads = [frozenset(Action("hear", word) for word in self._heard(rank, number)), frozenset()]
        if setup.tables == "cleared first":
            return [clears, *reads]
        reads[-1] |= clears
        return reads

    def _clears(self, rank: int, block: int, number: int, cleared: tuple[int, ...]) -> Stage:
        """What a block of a kernel of round ``number`` clears."""
        return frozenset(
            Action("clear", word, number - n)
            for n in cleared
            for word in self._heard(rank, n)
            if self._sender_of_row(word.place) == block
        )

    # Launches.

    def _launches(self, state: State, at: int) -> Iterator[Step]:
        """Kernels that the host of a rank may launch."""
        setup, rank = self.setup, state.ranks[at]
        if rank.dead or not self._may_launch(rank):
            return
        if self._may_send(rank):
            number = rank.sent + 1
            for targets in setup.targets[at] if setup.kind == "dispatch" else [self._targets(at, number)]:
                yield self._launch(state, at, "SR" if setup.fused else "S", number, targets)
        for number in self._receivable(rank):
            yield self._launch(state, at, "R", number, frozenset())

    def _receivable(self, rank: Rank) -> tuple[int, ...]:
        """Rounds that the host may receive next."""
        rounds = rank.unreceived
        if self.setup.order == "events":
            sending = [kernel.round for kernel in rank.kernels if kernel.phases == "S"]
            rounds = tuple(n for n in rounds if n not in sending)
        return rounds if self.setup.any_order else rounds[:1]

    def _may_launch(self, rank: Rank) -> bool:
        order, kernels = self.setup.order, rank.kernels
        if order == "stream":
            return not kernels
        if order == "events" or not kernels:
            return True
        if len(kernels) >= self.setup.queue:
            return False
        if order == "block":
            return any(not block.stages for block in kernels[-1].blocks)
        return all(block.started for block in kernels[-1].blocks)

    def _may_send(self, rank: Rank) -> bool:
        setup, oldest = self.setup, rank.sent + 1 - self.setup.in_flight
        if rank.sent == setup.rounds:
            return False
        if setup.order == "events" and any(k.phases == "S" or k.round <= oldest for k in rank.kernels):
            return False
        if setup.limit == "count":
            return len(rank.unreceived) < setup.in_flight
        return all(n > oldest for n in rank.unreceived)

    def _launch(self, state: State, at: int, phases: str, number: int, targets: Targets) -> Step:
        setup, rank = self.setup, state.ranks[at]
        sent, unreceived, uncleared = rank.sent, rank.unreceived, rank.uncleared
        in_send: tuple[int, ...] = ()
        in_receive: tuple[int, ...] = ()
        if "S" in phases:
            sent, unreceived = number, (*unreceived, number)
            if setup.tables == "cleared in send":
                in_send, uncleared = uncleared, ()
        if "R" in phases:
            unreceived = tuple(n for n in unreceived if n != number)
            if not self.tagged:
                if setup.tables != "cleared in send":
                    kept = len(uncleared) - (setup.table_lag - 1)
                    in_receive, uncleared = uncleared[: max(kept, 0)], uncleared[max(kept, 0) :]
                uncleared = (*uncleared, number)
        blocks = []
        for block in range(setup.blocks):
            stages: list[Stage] = []
            if "S" in phases:
                stages += self.send_stages(at, block, number, targets, self._clears(at, block, number, in_send))
            if "R" in phases:
                stages += self._receive_stages(at, block, number, self._clears(at, block, number, in_receive))
            blocks.append(_trimmed(Block(setup.order != "early", tuple(stages))))
        kernel = Kernel(phases, number, tuple(blocks), frozenset())
        following = Rank(sent, unreceived, uncleared, (*rank.kernels, kernel), False)
        return (Event(at, 0, phases, number, "launch"),), self._with_rank(state, at, following)

    def _with_rank(self, state: State, at: int, rank: Rank) -> State:
        """The state with a rank replaced; kernels that have ended are forgotten."""
        kernels = rank.kernels
        if self.setup.order == "events":
            kernels = tuple(kernel for kernel in kernels if not kernel.ended)
        while kernels and kernels[0].ended:
            kernels = kernels[1:]
        if kernels is not rank.kernels:
            rank = rank._replace(kernels=kernels)
        return State((*state.ranks[:at], rank, *state.ranks[at + 1 :]), state.memory, state.flying)

    # Blocks.

    def _running(self, state: State, at: int) -> Iterator[tuple[int, int, Kernel, Stage]]:
        """The blocks of a rank that may act: position of the kernel, block, kernel, what to do."""
        rank = state.ranks[at]
        if rank.dead:
            return
        for position, kernel in enumerate(rank.kernels):
            if not self._may_act(rank, position):
                continue
            for number, block in enumerate(kernel.blocks):
                if not block.started or not block.stages:
                    continue
                if self.setup.order == "block" and any(k.blocks[number].stages for k in rank.kernels[:position]):
                    continue
                yield position, number, kernel, block.stages[0]

    def _may_act(self, rank: Rank, position: int) -> bool:
        waits = any(phase in self.setup.waits for phase in rank.kernels[position].phases)
        return not waits or position == 0 or rank.kernels[position - 1].ended

    def _starts(self, state: State, at: int) -> Iterator[Step]:
        """Blocks that may start early."""
        rank = state.ranks[at]
        if rank.dead or self.setup.order != "early":
            return
        for position, kernel in enumerate(rank.kernels):
            if not self.setup.starts_others_first and not self._may_act(rank, position):
                continue
            for number, block in enumerate(kernel.blocks):
                if not block.started:
                    event = Event(at, number, kernel.phases, kernel.round, "start")
                    yield (event,), self._with_block(state, at, position, number, block._replace(started=True))

    def _with_block(
        self,
        state: State,
        at: int,
        position: int,
        number: int,
        block: Block,
        unperformed: frozenset[Cell] | None = None,
    ) -> State:
        rank = state.ranks[at]
        kernel = rank.kernels[position]
        kernel = Kernel(
            kernel.phases,
            kernel.round,
            (*kernel.blocks[:number], _trimmed(block), *kernel.blocks[number + 1 :]),
            kernel.unperformed if unperformed is None else unperformed,
        )
        kernels = (*rank.kernels[:position], kernel, *rank.kernels[position + 1 :])
        return self._with_rank(state, at, rank._replace(kernels=kernels))

    def _in_buffer(self, cells: frozenset[Cell], word: Word, number: int) -> Cell | None:
        """What the word holds in the buffer of a round."""
        buffers = self.buffers[word.part]
        for cell in cells:
            if cell.word == word and (cell.round - number) % buffers == 0:
                return cell
        return None

    def _here(self, state: State, action: Action, number: int) -> bool:
        """Whether a read finds its word."""
        cell = self._in_buffer(state.memory, action.word, number)
        if cell is None or (cell.round < number and self.tagged and action.verb == "hear"):
            return False
        if cell.round != number:
            raise Violation([], "a read of round {} finds data of round {}", number, cell.round)
        return True

    def _unread(self, state: State, word: Word, number: int) -> bool:
        """Whether some block has not yet read a packet."""
        rank = state.ranks[word.owner]
        if number > rank.sent or number in rank.unreceived:
            return True
        hear = Action("hear", word)
        return any(
            kernel.round == number and any(hear in stage for block in kernel.blocks for stage in block.stages)
            for kernel in rank.kernels
        )

    def _act(self, state: State, at: int, position: int, number: int, actions: Iterable[Action]) -> Step:
        """A block does, one after the other, what it can do in its stage."""
        kernel = state.ranks[at].kernels[position]
        first, *rest = kernel.blocks[number].stages
        memory, flying, unperformed = state.memory, state.flying, kernel.unperformed
        events: list[Event] = []
        heard: list[Action] = []
        for action in actions:
            verb, word, lag, rows = action
            n = kernel.round - lag
            events.append(Event(at, number, kernel.phases, kernel.round, verb, word, n))
            first -= {action}
            if verb == "put":
                cell = Cell(word, n, rows)
                if self.every_step:
                    flying |= {cell}
                else:
                    memory = self._written(memory, cell, events)
            elif verb == "hear":
                heard.append(action)
                learns = self.setup.kind == "dispatch" and self._sender_of_row(number) == word.place
                if learns and Cell(word, n, True) in memory:
                    rest[0] |= {Action("take", Word(at, "row", word.writer, number))}
            elif verb == "take":
                first |= {Action("wipe", word)}
            else:
                cell = self._cleared(state, action, n, events)
                if self.setup.lazy_clears:
                    unperformed |= {cell}
                else:
                    memory -= {cell}
        state = State(state.ranks, memory, flying)
        state = self._with_block(state, at, position, number, Block(True, (first, *rest)), unperformed)
        if self.tagged:
            read = [action.word for action in heard if not self._unread(state, action.word, kernel.round)]
            gone = frozenset(cell for cell in state.memory if cell.word in read and cell.round == kernel.round)
            state = state._replace(memory=state.memory - gone)
        return tuple(events), state

    def _written(self, memory: frozenset[Cell], cell: Cell, events: list[Event]) -> frozenset[Cell]:
        before = self._in_buffer(memory, cell.word, cell.round)
        if before is not None:
            part, writer, reader = cell.word.part, cell.word.writer, cell.word.owner
            raise Violation(
                events,
                f"the {part} of round {{}} from rank {writer} meets the one of round {{}}, of which rank {reader} is "
                "not done",
                cell.round,
                before.round,
            )
        return memory | {cell}

    def _cleared(self, state: State, action: Action, number: int, events: list[Event]) -> Cell:
        word = action.word
        cell = self._in_buffer(state.memory, word, number)
        if action.verb == "clear" and self._unread(state, word, number):
            raise Violation(
                events, f"rank {word.owner} clears a packet of round {{}} that one of its blocks still reads", number
            )
        if cell is None or cell.round != number:
            raise Violation(events, f"rank {word.owner} clears a word of round {{}} that does not hold it", number)
        return cell

    # Steps.

    def steps(self, state: State) -> Iterator[Step]:
        """All that may happen next."""
        for events, following in self._choices(state):
            if not self.every_step:
                more, following = self._settled(events, following)
                events += more
            yield events, following

    def _choices(self, state: State) -> Iterator[Step]:
        for at, rank in enumerate(state.ranks):
            yield from self._launches(state, at)
            yield from self._starts(state, at)
            for position, block, kernel, stage in self._running(state, at):
                for actions in self._groups(state, at, kernel, stage):
                    yield self._act(state, at, position, block, actions)
            yield from self._performs(state, at)
            if self.setup.mortal == at and not rank.dead:
                yield (Event(at, 0, "", 0, "die"),), self._with_rank(state, at, rank._replace(dead=True))
        for cell in state.flying:
            event = Event(cell.word.writer, 0, "", 0, "arrive", cell.word, cell.round)
            memory = self._written(state.memory, cell, [event])
            yield (event,), State(state.ranks, memory, state.flying - {cell})

    def _groups(self, state: State, at: int, kernel: Kernel, stage: Stage) -> Iterator[list[Action]]:
        """Actions of a block that are one step each time: see the reductions."""
        able = [a for a in sorted(stage) if a.verb not in ("hear", "take") or self._here(state, a, kernel.round)]
        if self.every_step:
            yield from ([action] for action in able)
            return
        by_verb: dict[Verb, list[Action]] = {"put": [], "hear": [], "take": [], "wipe": [], "clear": []}
        for action in able:
            by_verb[action.verb].append(action)
        yield from ([action] for action in by_verb["put"] + by_verb["take"])
        if by_verb["hear"] and len(by_verb["hear"]) == sum(action.verb == "hear" for action in stage):
            yield by_verb["hear"]
        only_clears = len(by_verb["wipe"]) + len(by_verb["clear"]) == len(stage)
        if not self.clears_follow_reads and by_verb["clear"]:
            yield by_verb["clear"]
        elif only_clears and by_verb["clear"]:
            yield by_verb["wipe"] + by_verb["clear"]
            return
        if only_clears and by_verb["wipe"]:
            yield by_verb["wipe"]

    def _performs(self, state: State, at: int) -> Iterator[Step]:
        """Clears that take effect."""
        for position, kernel in enumerate(state.ranks[at].kernels):
            cells = sorted(kernel.unperformed)
            for group in [[cell] for cell in cells] if self.every_step else [cells] if cells else []:
                events = (Event(at, 0, kernel.phases, kernel.round, "perform", cell.word, cell.round) for cell in group)
                following = state._replace(memory=state.memory - set(group))
                left = kernel._replace(unperformed=kernel.unperformed - set(group))
                rank = state.ranks[at]
                kernels = (*rank.kernels[:position], left, *rank.kernels[position + 1 :])
                yield tuple(events), self._with_rank(following, at, rank._replace(kernels=kernels))

    def _settled(self, before: tuple[Event, ...], state: State) -> Step:
        """The state once all that is taken as soon as it can be has been taken; and the events of that."""
        events: tuple[Event, ...] = ()
        try:
            while (following := self._next_harmless(state)) is not None:
                more, state = following
                events += more
        except Violation as violation:
            violation.events = before + events + violation.events
            raise
        return events, state

    def _next_harmless(self, state: State) -> Step | None:
        for at, rank in enumerate(state.ranks):
            if at == self.setup.mortal:  # it may die between any two
                continue
            for position, number, kernel, stage in self._running(state, at):
                actions = [action for action in stage if self._is_harmless(state, action, kernel.round)]
                if actions:
                    return self._act(state, at, position, number, sorted(actions))
            if self.setup.order == "stream" and not rank.kernels and not self._may_send(rank):
                receivable = self._receivable(rank)
                if len(receivable) == 1:
                    return self._launch(state, at, "R", receivable[0], frozenset())
        return None

    def _is_harmless(self, state: State, action: Action, number: int) -> bool:
        if action.verb == "put":
            return True
        if action.verb == "take" or (action.verb == "hear" and self.clears_follow_reads):
            return self._here(state, action, number)
        return False

    # Ends.

    def check_end(self, state: State) -> set[frozenset[Stuck]]:
        """Nobody can go on: who is stuck because a rank has died?"""
        stuck = set[Stuck]()
        for at, rank in enumerate(state.ranks):
            awaited: dict[int, set[int]] = {}
            for _, _, kernel, stage in self._running(state, at):
                reads = (a for a in stage if a.verb in ("hear", "take") and not self._here(state, a, kernel.round))
                awaited.setdefault(kernel.round, set()).update(action.word.writer for action in reads)
            stuck |= {Stuck(at, n, frozenset(peers)) for n, peers in awaited.items() if not rank.dead}
        if any(rank.dead for rank in state.ranks):
            return {frozenset(stuck)}
        finished = all(
            rank.sent == self.setup.rounds and not rank.unreceived and not rank.kernels for rank in state.ranks
        )
        if not finished:
            waits = "; ".join(f"rank {s.rank} waits for {sorted(s.peers)} in round {{}}" for s in sorted(stuck))
            raise Violation([], f"nobody can go on: {waits}", *(s.round for s in sorted(stuck)))
        return set()


def _trimmed(block: Block) -> Block:
    """Without the stages that are over."""
    stages = block.stages
    while stages and not stages[0]:
        stages = stages[1:]
    return Block(block.started, stages)
