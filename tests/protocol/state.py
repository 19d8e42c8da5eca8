"""What a state of the model consists of, and what a search reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Part = Literal["packet", "row", "weight"]
Verb = Literal["put", "arrive", "hear", "take", "wipe", "clear", "perform", "start", "launch", "die"]


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
