"""Low-latency dispatch and combine: ours with and without hook and CUDA graph, beside what else a decode step can use.

    python benchmarks/low_latency.py --ranks 2 --tokens 1 8 64 128 256 512 --out results

One process a GPU (or under ``torchrun``). A figure is the time of one call: 20 calls back to back, launched one by one
or replayed as one CUDA graph, over 20; the slowest rank of each repeat counts, medians over repeats. ``hook`` sends and
receives in two launches, the hook called at once. ``send`` and ``receive`` are each of these launches alone, between
two events, with a pause between them in which the data arrives; two events with nothing between them are ``nothing
between events``, to be taken off. ``low_latency`` sends routing weights with the rows, as a layer does, and
``late_weights`` with the sums, as programs written for DeepEP do. In ``loopback`` and ``nvshmem`` every GPU poses as a
node of its own: this says what puts cost, and nothing of a network. The floor is the remote bytes over the rate that
copies between the GPUs reach here, without any latency; ``empty kernel`` is what a launch alone costs. What is compared
does not do the same things: see ``decode_exchanges.py``. Where ranks share a GPU, times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from decode_exchanges import EXCHANGES, Exchange, Send, SkippedError, low_latency_communicator
from machine import Machine, Rates, add_ranks_argument, launch, measure_rates, say, start
from problem import Problem, make_problem, row_bytes
from results import save
from timing import Call, Spread, capture, repeat, spread_of, time_call

CALLS, SHARED_CALLS = 20, 2
PAUSE_CYCLES = 100_000  # about 50 us: peers' data arrives, and the host gets ahead
ONE_HOST = ["low_latency", "late_weights", "normal", "nccl", "deep_ep"]
DTYPES = {"bf16": False, "fp8": True}  # bf16 first: graphs keep the buffers from growing later


@dataclass(frozen=True)
class Line:
    """One line of the table; microseconds, NaN where skipped."""

    communicator: str
    dtype: str  # of dispatched rows
    tokens: int
    what: str
    hook: bool
    graph: bool
    median: float
    least: float
    most: float
    floor: float
    skipped: str | None = None


@dataclass(frozen=True)
class Setting:
    """What lines of one exchange have in common, and how long the wire takes at least."""

    machine: Machine
    calls: int
    communicator: str
    dtype: str
    tokens: int
    dispatch_floor: float
    combine_floor: float

    @property
    def floors(self) -> dict[str, float]:
        """Of every operation."""
        both = self.dispatch_floor + self.combine_floor
        return {"dispatch": self.dispatch_floor, "combine": self.combine_floor, "round trip": both}

    def line(self, what: str, hook: bool, graph: bool, spread: Spread, floor: float) -> Line:
        """The line of one measurement."""
        times = (spread.median, spread.least, spread.most)
        return Line(self.communicator, self.dtype, self.tokens, what, hook, graph, *times, floor)


def main() -> None:
    """Measure all token counts."""
    arguments = parse_arguments()
    launch(arguments.ranks)
    machine = start()
    rates = measure_rates(machine)
    calls = SHARED_CALLS if machine.shared else CALLS
    say(f"{vars(arguments)}, averages over {calls} calls")
    say(
        f"{'communicator':<12} {'rows':<5} {'tokens':>6} {'what':<26} {'hook':<4} {'graph':<5} "
        f"{'median':>8} {'min':>8} {'max':>8} {'floor':>7} us"
    )
    lines = list(measure_overheads(machine, calls))
    buffers = {}
    for tokens in arguments.tokens:
        room = max(tokens, arguments.max_tokens)
        problem = make_problem(
            machine, tokens=tokens, hidden=arguments.hidden, top_k=arguments.top_k, experts=arguments.experts
        )
        for dtype in DTYPES:
            for name in arguments.communicators:
                lines += measure(name, dtype, problem, room, machine, rates, calls)
        if "low_latency" in arguments.communicators:
            communicator = low_latency_communicator(machine, room, arguments.hidden, arguments.experts, None)
            buffers[room] = communicator.symmetric_bytes
            say(f"symmetric buffer for {room} tokens: {buffers[room] / 1e6:.1f} MB")
    facts = {"link_gb_s": rates.link / 1e3, "memory_gb_s": rates.memory / 1e3, "symmetric_bytes": buffers}
    save("low_latency", arguments.out, machine, vars(arguments) | facts, lines, functools.partial(draw, lines))
    dist.barrier()
    if "nvshmem" in arguments.communicators:
        from ep_moe.comm.nvshmem import shutdown

        shutdown()
    dist.destroy_process_group()


def measure_overheads(machine: Machine, calls: int) -> Iterator[Line]:
    """What a measurement of nothing gives."""
    setting = Setting(machine, calls, "none", "", 0, 0.0, 0.0)
    empty = functools.partial(torch.cuda._sleep, 0)
    for graph in (False, True):
        yield shown(time_calls(setting, "empty kernel", empty, False, graph, 0.0))
        yield from map(shown, time_phases(setting, "nothing between events", None, graph, 0.0))


def measure(
    name: str, dtype: str, problem: Problem, room: int, machine: Machine, rates: Rates, calls: int
) -> Iterator[Line]:
    """Lines of one communicator, dtype and number of tokens."""
    dispatched, combined = (problem.remote_rows * row_bytes(problem.hidden, fp8) for fp8 in (DTYPES[dtype], False))
    floors = (dispatched / rates.link, combined / rates.link)
    setting = Setting(machine, calls, name, dtype, problem.tokens, *floors)
    try:
        exchange = EXCHANGES[name](machine, problem, room, DTYPES[dtype])
    except SkippedError as error:
        skipped = Spread(math.nan, math.nan, math.nan)
        line = setting.line("round trip", False, False, skipped, setting.floors["round trip"])
        yield shown(replace(line, skipped=str(error)))
        return
    for graph in (False, True):
        for hook in (False, True) if exchange.dispatch_send is not None else (False,):
            for what, call in operations(exchange, hook).items():
                yield shown(time_calls(setting, what, call, hook, graph, setting.floors[what]))
        for what, send in (("dispatch", exchange.dispatch_send), ("combine", exchange.combine_send)):
            if send is not None:
                yield from map(shown, time_phases(setting, what, send, graph, setting.floors[what]))


def operations(exchange: Exchange, hook: bool) -> dict[str, Call]:
    """What to time, by name."""
    dispatch, combine = exchange.dispatch, exchange.combine
    if hook:
        assert exchange.dispatch_send is not None and exchange.combine_send is not None
        dispatch, combine = at_once(exchange.dispatch_send), at_once(exchange.combine_send)
    return {"dispatch": dispatch, "combine": combine, "round trip": lambda: (dispatch(), combine())}


def at_once(send: Send) -> Call:
    """Send, and receive behind it."""
    return lambda: send()()


def time_calls(setting: Setting, what: str, call: Call, hook: bool, graph: bool, floor: float) -> Line:
    """Time calls back to back."""
    many = capture(call, setting.calls) if graph else functools.partial(repeat, call, setting.calls)
    return setting.line(what, hook, graph, time_call(many, setting.machine, calls=setting.calls), floor)


def time_phases(setting: Setting, what: str, send: Send | None, graph: bool, floor: float) -> list[Line]:
    """Time sends and receives one by one, each between two events; without ``send`` the events alone."""
    marks = [[torch.cuda.Event(enable_timing=True, external=True) for _ in range(4)] for _ in range(setting.calls)]

    def run() -> None:
        torch.cuda._sleep(10 * PAUSE_CYCLES)
        for before_send, after_send, before_receive, after_receive in marks:
            before_send.record()
            hook = send() if send is not None else None
            after_send.record()
            torch.cuda._sleep(PAUSE_CYCLES)
            before_receive.record()
            if hook is not None:
                hook()
            after_receive.record()

    call = capture(run) if graph else run

    def once() -> list[float]:
        dist.barrier()
        call()
        torch.cuda.synchronize()
        sends = sum(mark[0].elapsed_time(mark[1]) for mark in marks)
        receives = sum(mark[2].elapsed_time(mark[3]) for mark in marks)
        return [sends / setting.calls, receives / setting.calls]

    sent, received = spread_of(once, setting.machine)
    if send is None:
        return [setting.line(what, False, graph, sent, floor)]
    return [
        setting.line(f"{what} send", True, graph, sent, floor),
        setting.line(f"{what} receive", True, graph, received, 0.0),
    ]


def shown(line: Line) -> Line:
    """Print a line."""
    head = (
        f"{line.communicator:<12} {line.dtype:<5} {line.tokens:>6} {line.what:<26} "
        f"{'yes' if line.hook else '-':<4} {'yes' if line.graph else '-':<5} "
    )
    figures = f"{line.median:8.1f} {line.least:8.1f} {line.most:8.1f} {line.floor:7.1f}"
    say(head + (figures if line.skipped is None else f"skipped: {line.skipped}"))
    return line


def draw(lines: list[Line], pyplot: Any) -> Any:
    """Time over tokens, a panel for each operation and dtype."""
    panels = [(what, dtype) for dtype in DTYPES for what in ("dispatch", "combine", "round trip", "phases")]
    figure, axes = pyplot.subplots(2, 4, figsize=(18, 8), squeeze=False)
    for axis, (what, dtype) in zip(axes.flat, panels, strict=True):
        curves: dict[str, list[Line]] = {}
        for line in lines:
            phase = line.what.endswith(("send", "receive"))
            if line.dtype == dtype and line.skipped is None and (phase if what == "phases" else line.what == what):
                curves.setdefault(_label(line, phase), []).append(line)
        for label, points in curves.items():
            style = "o-" if points[0].graph else "o:"
            axis.plot([p.tokens for p in points], [p.median for p in points], style, markersize=3, label=label)
        if what != "phases" and curves:
            points = next(iter(curves.values()))
            axis.plot([p.tokens for p in points], [p.floor for p in points], color="black", label="bytes over links")
        axis.set(title=f"{what}, {dtype} rows", xlabel="tokens a rank", ylabel="us", yscale="log")
        axis.set_xscale("log", base=2)
        if curves:
            axis.legend(fontsize=6)
    return figure


def _label(line: Line, phase: bool) -> str:
    parts = [line.communicator] + ([line.what] if phase else []) + (["hook"] if line.hook and not phase else [])
    return ", ".join(parts + (["graph"] if line.graph else []))


def parse_arguments() -> argparse.Namespace:
    """The shape, and the numbers of tokens to try."""
    parser = argparse.ArgumentParser(description="Low-latency dispatch and combine.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 128, 256, 512], help="per rank")
    parser.add_argument("--max-tokens", type=int, default=128, help="room of buffers, unless tokens are more")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--communicators", nargs="+", choices=list(EXCHANGES), default=ONE_HOST)
    parser.add_argument("--out", type=Path, help="folder for low_latency.json and low_latency.png")
    add_ranks_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
