"""The protocol of low-latency mode holds in every interleaving, and each of its conditions is needed.

Package ``protocol`` states the protocol and its argument. Where a condition is dropped, a failing run must be found; it
is printed, so ``pytest -s`` shows why the condition is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from protocol.model import Model
from protocol.search import explore
from protocol.state import Result, Stuck
from protocol.variant import Setup, Targets, rows_for_all, rows_for_none, rows_for_some, rows_from_first

NOBODY, FIRST, SECOND, BOTH = frozenset[int](), frozenset([0]), frozenset([1]), frozenset([0, 1])

# Of two ranks, by round.
CHANGING_ROWS: tuple[tuple[Targets, ...], ...] = (
    (BOTH, NOBODY, SECOND, NOBODY, SECOND, BOTH),
    (BOTH, NOBODY, NOBODY, NOBODY, FIRST, NOBODY),
)


def setup(in_flight: int, **changes: Any) -> Setup:
    """Just as many buffers as are needed, for receives in order and tables that the next receive clears."""
    needed = {"row_buffers": 2 * in_flight, "table_buffers": 2 * in_flight + 1}
    return Setup(in_flight=in_flight, **{**needed, **changes})


def tagged(in_flight: int, **changes: Any) -> Setup:
    """The same for tables whose words carry their round; receives come in any order."""
    given: dict[str, Any] = {"tables": "tagged", "table_buffers": 2 * in_flight, "any_order": in_flight > 1}
    return setup(in_flight, **{**given, **changes})


def combine(in_flight: int, **changes: Any) -> Setup:
    """A combine in which the weights travelled earlier."""
    return tagged(in_flight, **{"kind": "combine", **changes})


def assert_holds(what: Setup) -> None:
    result = explore(what)
    assert result.violation is None, str(result)


def assert_fails(what: Setup, how: str) -> Result:
    result = explore(what)
    print(f"\n{what}\n{result}")
    assert result.violation is not None, str(result)
    assert how in result.violation, str(result)
    assert result.trace
    return result


# Violations.
PACKET_MEETS = "the packet of round"
ROW_MEETS = "the row of round"
CLEARED_TOO_EARLY = "that one of its blocks still reads"


# Buffers.


@pytest.mark.parametrize("rows", [rows_for_all, rows_for_none, rows_from_first])
@pytest.mark.parametrize("tables", ["cleared first", "cleared after", "cleared in send"])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_2k_row_buffers_and_2k_plus_1_tables_suffice(
    in_flight: int, ranks: int, tables: str, rows: Callable[[int], tuple[tuple[Targets, ...], ...]]
) -> None:
    assert_holds(setup(in_flight, ranks=ranks, tables=tables, targets=rows(ranks)))


@pytest.mark.parametrize("rows", [rows_for_all, rows_for_none, rows_from_first])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_2k_tables_suffice_if_words_carry_their_round(
    in_flight: int, ranks: int, rows: Callable[[int], tuple[tuple[Targets, ...], ...]]
) -> None:
    assert_holds(tagged(in_flight, ranks=ranks, targets=rows(ranks)))


@pytest.mark.parametrize("tables", ["cleared first", "cleared after"])
def test_all_patterns_of_rows(tables: str) -> None:
    assert_holds(setup(1, tables=tables, targets=rows_for_some(2)))


def test_many_patterns_of_rows_in_three_ranks() -> None:
    third = frozenset([2])
    assert_holds(setup(1, ranks=3, targets=((NOBODY, SECOND), (NOBODY, third), (NOBODY, FIRST | third))))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_one_row_buffer_less_fails(in_flight: int, ranks: int) -> None:
    assert_fails(setup(in_flight, ranks=ranks, row_buffers=2 * in_flight - 1), ROW_MEETS)


@pytest.mark.parametrize("tables", ["cleared first", "cleared after", "cleared in send"])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_one_table_less_fails(in_flight: int, tables: str) -> None:
    assert_fails(setup(in_flight, table_buffers=2 * in_flight, tables=tables), PACKET_MEETS)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_one_tagged_table_less_fails(in_flight: int) -> None:
    assert_fails(tagged(in_flight, table_buffers=2 * in_flight - 1), PACKET_MEETS)


# Receives in any order.


@pytest.mark.parametrize(
    "rows", [rows_for_all(2), rows_from_first(2), rows_for_none(2)], ids=["all", "from first", "none"]
)
def test_receives_in_any_order_need_another_cleared_table(rows: tuple[tuple[Targets, ...], ...]) -> None:
    any_order = setup(2, any_order=True, targets=rows)
    assert_fails(any_order, PACKET_MEETS)
    assert_holds(replace(any_order, table_buffers=6))


def test_receives_of_three_ranks_in_any_order() -> None:
    assert_holds(setup(2, ranks=3, any_order=True, table_buffers=6, targets=rows_for_none(3)))


@pytest.mark.parametrize("rows", [rows_for_all, rows_from_first])
def test_receives_in_any_order_need_no_other_table_that_sends_clear(
    rows: Callable[[int], tuple[tuple[Targets, ...], ...]],
) -> None:
    assert_holds(setup(2, any_order=True, tables="cleared in send", targets=rows(2)))


@pytest.mark.parametrize("buffers", [4, 6])
def test_counting_rounds_in_flight_is_not_enough(buffers: int) -> None:
    """One round is never received, while all others are: no number of buffers does."""
    any_order = setup(2, any_order=True, limit="count", row_buffers=buffers, table_buffers=buffers + 2)
    assert_fails(any_order, ROW_MEETS)


# Packets of a combine.


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_combine_needs_packets_of_ranks_without_rows(in_flight: int, ranks: int) -> None:
    one_way = combine(in_flight, ranks=ranks, targets=rows_from_first(ranks))
    assert_holds(one_way)
    # Tables are no excuse: with more of them it is rows that meet.
    result = assert_fails(replace(one_way, packets="with rows", table_buffers=9), ROW_MEETS)
    assert "from rank 0" in str(result.violation)


@pytest.mark.parametrize("rows", [rows_for_all(2), rows_for_none(2), rows_from_first(2), CHANGING_ROWS])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_combine_that_asks_by_weights_needs_k_row_buffers(
    in_flight: int, blocks: int, rows: tuple[tuple[Targets, ...], ...]
) -> None:
    asks = combine(in_flight, weights=True, row_buffers=in_flight, blocks=blocks, targets=rows)
    assert_holds(asks)
    # Ranks that do not hear from one another drift apart without bound; so the rounds are bounded here.
    assert_holds(replace(asks, packets="none", rounds=5))


def test_combine_that_asks_by_weights_needs_no_fewer() -> None:
    assert_fails(combine(2, weights=True, row_buffers=1), "meets")


# Blocks and kernels.


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tables", ["cleared first", "cleared after"])
def test_blocks_of_kernels_in_a_stream(tables: str, fused: bool) -> None:
    assert_holds(setup(1, blocks=2, tables=tables, fused=fused))


@pytest.mark.parametrize("fused", [False, True])
def test_blocks_of_kernels_in_a_stream_with_tagged_tables(fused: bool) -> None:
    assert_holds(tagged(1, blocks=2, fused=fused))


def test_blocks_of_kernels_in_a_stream_with_two_rounds_in_flight() -> None:
    assert_holds(setup(2, blocks=2))
    assert_holds(setup(2, blocks=2, any_order=True, table_buffers=6, targets=rows_from_first(2)))
    assert_holds(tagged(2, blocks=2, targets=rows_from_first(2)))


@pytest.mark.parametrize("tables", ["cleared first", "cleared after", "cleared in send"])
def test_receives_on_another_stream_must_not_clear_tables(tables: str) -> None:
    """R(n + 1) may then clear table n while blocks of R(n) read it."""
    assert_fails(setup(2, blocks=2, order="events", tables=tables), CLEARED_TOO_EARLY)


def test_receives_on_another_stream_with_tagged_tables() -> None:
    assert_holds(tagged(2, order="events"))
    assert_holds(tagged(2, order="events", blocks=2, targets=rows_for_none(2)))
    assert_holds(combine(2, order="events", blocks=2, targets=rows_from_first(2)))


def test_receives_on_another_stream_that_clear_the_table_before_last() -> None:
    assert_holds(setup(2, blocks=2, order="events", table_lag=2, table_buffers=6, targets=rows_for_none(2)))


def test_order_of_the_same_block_alone_must_not_clear_before_it_reads() -> None:
    """Having heard from all blocks, also from its own rank's, a block knows that they have read the table before."""
    one = setup(1, blocks=2, order="block")
    assert_holds(one)
    assert_fails(replace(one, tables="cleared first"), CLEARED_TOO_EARLY)
    assert_fails(replace(one, tables="cleared in send"), CLEARED_TOO_EARLY)
    assert_holds(tagged(1, blocks=2, order="block"))


def test_order_of_the_same_block_alone_with_two_rounds_in_flight() -> None:
    """Having heard from a block in round n says that it has received round n - k: that table can be cleared."""
    two = setup(2, blocks=2, order="block", targets=rows_for_none(2))
    assert_fails(two, CLEARED_TOO_EARLY)
    assert_fails(replace(two, table_lag=2), PACKET_MEETS)
    assert_holds(replace(two, table_lag=2, table_buffers=6))
    assert_holds(tagged(2, blocks=2, order="block", targets=rows_for_none(2)))


def test_a_block_that_sends_no_packet_is_not_waited_for() -> None:
    """In a combine only block 0 sends a packet: without order among kernels, nobody knows what the others have read."""
    alone = combine(1, blocks=2, order="block", targets=rows_from_first(2))
    assert_fails(alone, PACKET_MEETS)
    assert_fails(replace(alone, table_buffers=9), ROW_MEETS)
    assert_holds(replace(alone, order="stream"))


def test_clears_take_effect_when_their_kernel_ends() -> None:
    assert_holds(setup(1, blocks=2, lazy_clears=True))
    # The end of a block says nothing: here the packet of the next send would need a fence before it.
    assert_fails(setup(1, order="block", lazy_clears=True), ROW_MEETS)


# Kernels that start before the one ahead has ended.


def early(waits: str, **changes: Any) -> dict[str, Any]:
    return {"order": "early", "blocks": 2, "waits": waits, **changes}


@pytest.mark.parametrize("waits", ["", "R"])
def test_early_sends_that_do_not_wait_fail(waits: str) -> None:
    """A send must not write before the receive ahead has ended; that receives wait does not help."""
    assert_fails(setup(1, **early(waits)), ROW_MEETS)
    assert_fails(setup(1, **early(waits), tables="cleared first"), CLEARED_TOO_EARLY)
    assert_fails(tagged(1, **early(waits)), PACKET_MEETS)


def test_early_kernels_of_both_phases_that_do_not_wait_fail() -> None:
    assert_fails(setup(1, **early("", fused=True)), ROW_MEETS)
    assert_fails(tagged(1, **early("", fused=True)), PACKET_MEETS)


@pytest.mark.parametrize("starts_others_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_early_kernels_that_wait_hold(fused: bool, starts_others_first: bool) -> None:
    waiting = early("SR", fused=fused, starts_others_first=starts_others_first)
    assert_holds(tagged(1, **waiting))
    assert_holds(setup(1, **waiting, tables="cleared first", targets=rows_for_none(2), queue=2))
    assert_holds(combine(1, **waiting, weights=True, targets=rows_from_first(2)))


def test_early_receives_need_not_wait() -> None:
    """A receive that has heard from its own rank knows that the send before it has waited."""
    sends_wait = early("S", targets=rows_for_none(2))
    assert_holds(setup(1, **sends_wait))
    assert_holds(tagged(1, **sends_wait))
    # Before it has heard, it knows so only if the send let it start after its own wait.
    clears_first = setup(1, **sends_wait, tables="cleared first")
    assert_fails(clears_first, CLEARED_TOO_EARLY)
    assert_holds(replace(clears_first, starts_others_first=False))


# A rank that dies.


def check_names(end: frozenset[Stuck], dead: int) -> None:
    """All name the dead rank; the earliest it alone, others only ranks that are stuck in an earlier round."""
    stuck_in = {stuck.rank: stuck.round for stuck in end}
    for stuck in end:
        assert dead in stuck.peers
        assert all(stuck_in[peer] < stuck.round for peer in stuck.peers - {dead})
    assert {stuck.peers for stuck in end if stuck.round == min(stuck_in.values())} == {frozenset([dead])}


@pytest.mark.parametrize("in_flight", [1, 2])
def test_of_two_ranks_the_living_one_names_the_dead_one(in_flight: int) -> None:
    result = explore(setup(in_flight, mortal=1))
    assert result.violation is None, str(result)
    assert result.ends
    assert all({(stuck.rank, stuck.peers) for stuck in end} == {(0, SECOND)} for end in result.ends)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(setup(1, ranks=3, mortal=2), id="split"),
        pytest.param(setup(1, ranks=3, mortal=2, fused=True), id="fused"),
        pytest.param(combine(1, ranks=3, mortal=2, fused=True), id="combine"),
        pytest.param(setup(2, ranks=3, mortal=2, targets=((SECOND,), (NOBODY,), (FIRST,))), id="two in flight"),
    ],
)
def test_of_three_ranks_the_earliest_stuck_names_the_dead_one_alone(what: Setup) -> None:
    result = explore(what)
    assert result.violation is None, str(result)
    for end in result.ends:
        assert {stuck.rank for stuck in end} == {0, 1}
        check_names(end, dead=2)
    # One that got all of the last send, and so is a round ahead, also waits for the one that did not.
    assert any(len(stuck.peers) == 2 for end in result.ends for stuck in end)


def test_a_combine_that_asks_may_name_a_living_rank() -> None:
    """Rank 1 cannot send before rank 2 has asked; so rank 0, which expects no row of rank 2, waits for rank 1 alone."""
    third = frozenset([2])
    asks = combine(1, ranks=3, weights=True, row_buffers=1, targets=((NOBODY,), (FIRST | third,), (NOBODY,)), mortal=2)
    result = explore(asks)
    assert result.violation is None, str(result)
    assert {(0, SECOND), (1, third)} in [{(stuck.rank, stuck.peers) for stuck in end} for end in result.ends]


# Puts between nodes, which read staging places as late as they like.


@pytest.mark.parametrize("what", [tagged(1, targets=rows_from_first(2)), combine(1, targets=rows_from_first(2))])
def test_puts_have_left_their_staging_places_before_these_are_written_again(what: Setup) -> None:
    result = explore(what, every_step=True)
    assert result.violation is None, str(result)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(tagged(1, row_buffers=1, targets=rows_from_first(2)), id="rows"),
        pytest.param(tagged(1, table_buffers=1, targets=rows_for_none(2)), id="packets"),
        pytest.param(tagged(2, table_buffers=3, targets=rows_for_none(2)), id="two in flight"),
        pytest.param(combine(1, row_buffers=1, targets=rows_from_first(2)), id="combine"),
    ],
)
def test_one_staging_place_less_fails(what: Setup) -> None:
    result = explore(what, every_step=True)
    assert result.violation is not None
    assert "is staged where the one of round 1 is still being put from" in result.violation


# The search itself.


def assert_same_verdict(what: Setup) -> None:
    assert (explore(what).violation is None) == (explore(what, every_step=True).violation is None)


@pytest.mark.parametrize("tables", ["cleared first", "cleared after", "cleared in send", "tagged"])
@pytest.mark.parametrize("table_buffers", [1, 2, 3])
@pytest.mark.parametrize("row_buffers", [1, 2])
def test_reductions_change_no_verdict(row_buffers: int, table_buffers: int, tables: Any) -> None:
    assert_same_verdict(
        Setup(row_buffers=row_buffers, table_buffers=table_buffers, tables=tables, targets=rows_from_first(2))
    )


@pytest.mark.parametrize("order", ["stream", "events", "block", "early"])
@pytest.mark.parametrize("tables", ["cleared first", "cleared after", "cleared in send", "tagged"])
@pytest.mark.parametrize("table_buffers", [1, 2, 3])
def test_reductions_change_no_verdict_of_blocks(table_buffers: int, tables: Any, order: Any) -> None:
    """Of one rank, which sends to itself: all that its blocks can do to one another."""
    one = Setup(ranks=1, blocks=2, table_buffers=table_buffers, tables=tables, order=order, queue=2)
    assert_same_verdict(replace(one, fused=True))
    if order == "early":
        one = replace(one, targets=rows_for_none(1))
    assert_same_verdict(one)
    assert_same_verdict(replace(one, kind="combine", weights=True))
    if order != "early":
        assert_same_verdict(replace(one, in_flight=2, any_order=True, row_buffers=4, targets=rows_for_none(1)))
    elif table_buffers == 2:
        assert_same_verdict(replace(one, waits="S"))
        assert_same_verdict(replace(one, waits="SR", fused=True))


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(tagged(2, targets=rows_for_none(2)), id="two in flight"),
        pytest.param(combine(1, targets=rows_from_first(2), packets="with rows"), id="silent rank"),
        pytest.param(combine(1, targets=rows_from_first(2), weights=True, row_buffers=1), id="weights"),
        pytest.param(setup(1, targets=rows_from_first(2), lazy_clears=True), id="lazy clears"),
    ],
)
def test_reductions_change_no_verdict_of_other_variants(what: Setup) -> None:
    assert_same_verdict(what)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_bounded_number_of_rounds_ends(in_flight: int) -> None:
    """Everybody finishes; and what an unbounded search finds is there within 2B + 2 rounds."""
    rounds = 4 * in_flight + 2
    assert_holds(setup(in_flight, ranks=3, rounds=rounds))
    assert_fails(setup(in_flight, rounds=rounds, row_buffers=2 * in_flight - 1), ROW_MEETS)
    assert_fails(setup(in_flight, rounds=rounds, table_buffers=2 * in_flight), PACKET_MEETS)


def test_a_trace_reads_as_a_story() -> None:
    result = explore(setup(1, row_buffers=1))
    assert result.violation == "the row of round 2 from rank 0 meets the one of round 1, of which rank 1 is not done"
    assert result.trace[0] == "rank 0, S(1): is launched"
    assert "rank 0, R(1): empties the round 1 row of rank 0 and 1" in result.trace
    assert result.trace[-1] == "rank 0, S(2): writes its round 2 row to rank 1"
    assert not any(line.startswith("rank 1, R(1): empties") for line in result.trace)


def test_waiting_for_ever_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 waits for a packet that rank 0 forgets; rank 0 then waits for rank 1, which does not go on."""
    stages = Model.send_stages

    def forgets(self: Model, rank: int, block: int, number: int, targets: Targets, clears: Any) -> Any:
        first, *rest = stages(self, rank, block, number, targets, clears)
        return [frozenset(action for action in first if rank == 1 or action.word.owner != 1), *rest]

    monkeypatch.setattr(Model, "send_stages", forgets)
    result = assert_fails(setup(1, targets=rows_for_none(2)), "nobody can go on")
    assert result.violation == "nobody can go on: rank 0 waits for [1] in round 2; rank 1 waits for [0] in round 1"
