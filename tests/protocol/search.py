"""The search over all states that can be reached, and how its findings read."""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby

from protocol.model import Model
from protocol.state import Cell, Event, Kernel, Rank, Result, State, Stuck, Verb, Violation
from protocol.variant import Setup


@contextlib.contextmanager
def _without_looking_for_cycles() -> Iterator[None]:
    """States are tuples of tuples, of which none holds itself; to find that out takes a tenth of a search."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_looking_for_cycles()
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
                base = 0
                if setup.rounds is None:
                    base, following = _normalise(following, setup.period)
                step = (state, events, base)
                if came_from.setdefault(following, step) is step:
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
