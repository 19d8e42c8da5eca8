"""The steps that may follow a state: launches by the hosts, and actions of the blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

from protocol.state import (
    Action,
    Block,
    Cell,
    Event,
    Kernel,
    Part,
    Rank,
    Stage,
    State,
    Step,
    Stuck,
    Verb,
    Violation,
    Word,
)
from protocol.variant import Setup, Targets


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
        self._blocks = functools.cache(self._new_blocks)  # rounds are counted anew, so few kernels differ

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
        blocks = self._blocks(at, phases, number, targets, in_send, in_receive)
        kernel = Kernel(phases, number, blocks, frozenset())
        following = Rank(sent, unreceived, uncleared, (*rank.kernels, kernel), False)
        return (Event(at, 0, phases, number, "launch"),), self._with_rank(state, at, following)

    def _new_blocks(
        self, at: int, phases: str, number: int, targets: Targets, in_send: tuple[int, ...], in_receive: tuple[int, ...]
    ) -> tuple[Block, ...]:
        """The blocks of a kernel, which clears tables of the rounds ``in_send`` and ``in_receive``."""
        blocks = []
        for block in range(self.setup.blocks):
            stages: list[Stage] = []
            if "S" in phases:
                stages += self.send_stages(at, block, number, targets, self._clears(at, block, number, in_send))
            if "R" in phases:
                stages += self._receive_stages(at, block, number, self._clears(at, block, number, in_receive))
            blocks.append(_trimmed(Block(self.setup.order != "early", tuple(stages))))
        return tuple(blocks)

    def _with_rank(self, state: State, at: int, rank: Rank) -> State:
        """The state with a rank replaced; kernels that have ended are forgotten."""
        kernels = rank.kernels
        if self.setup.order == "events":
            kernels = tuple(kernel for kernel in kernels if not kernel.ended)
        while kernels and kernels[0].ended:
            kernels = kernels[1:]
        if kernels is not rank.kernels:
            rank = Rank(rank.sent, rank.unreceived, rank.uncleared, kernels, rank.dead)
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
        if position == 0 or not self.setup.waits:
            return True
        waits = any(phase in self.setup.waits for phase in rank.kernels[position].phases)
        return not waits or rank.kernels[position - 1].ended

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
        following = Rank(rank.sent, rank.unreceived, rank.uncleared, kernels, rank.dead)
        return self._with_rank(state, at, following)

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
                    flying = self._sent(flying, cell, events)
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

    def _sent(self, flying: frozenset[Cell], cell: Cell, events: list[Event]) -> frozenset[Cell]:
        before = self._in_buffer(flying, cell.word, cell.round)
        if before is not None:
            raise Violation(
                events,
                f"the {cell.word.part} of round {{}} of rank {cell.word.writer} is staged where the one of round {{}} "
                "is still being put from",
                cell.round,
                before.round,
            )
        return flying | {cell}

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
