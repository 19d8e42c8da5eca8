"""Normal-mode dispatch and combine: ours over SM budgets, beside ``torch.distributed`` collectives and the floors.

    python benchmarks/normal.py --ranks 2 --tokens 4096 --hidden 7168 --top-k 8 --experts 256 --out results

One process a GPU (or under ``torchrun``). Times are of the slowest rank of each call, from CUDA events after a
collective barrier with flushed caches; a figure is their median. Dispatch counts from ``topk_idx`` on the GPU to rows
in place, combine from expert-major rows to the final sum. `captured` is the same in a CUDA graph, with a capacity
instead of exact sizes: without the host. A floor is the larger of remote bytes over the rate of this machine's links
and memory traffic over that of its memory, both measured here. With one process there are no remote bytes: the figures
are the local work's.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_moe.comm import Communicator, NvlinkCommunicator, PortableCommunicator, RowLayout
from machine import Machine, Rates, add_ranks_argument, launch, measure_rates, say, start
from problem import Problem, make_problem, row_bytes
from results import save
from timing import capture, time_call


@dataclass(frozen=True)
class Line:
    """One line of the table; microseconds."""

    communicator: str
    rows: str
    sms: int | None
    what: str
    median: float
    least: float
    most: float
    floor: float


def main() -> None:
    """Measure one shape."""
    arguments = parse_arguments()
    launch(arguments.ranks)
    machine = start()
    shape = {name: getattr(arguments, name) for name in ("tokens", "hidden", "top_k", "experts")}
    problem = make_problem(machine, **shape)
    rates = measure_rates(machine)
    say(f"{shape}; to rank 0: {problem.remote_rows} remote rows of {problem.rows}, {problem.slots} slots")
    say(
        f"{'communicator':<12} {'rows':<18} {'SMs':>4} {'what':<28} {'median':>8} {'min':>8} {'max':>8} {'floor':>8} us"
    )
    lines = []
    for fp8 in (False, True):
        nvlink = NvlinkCommunicator(machine.group, machine.device, max_tokens=arguments.tokens)
        for sms in arguments.sms:
            lines += list(measure("nvlink", nvlink, problem, fp8, sms, rates, machine, arguments.groups))
        portable = PortableCommunicator(machine.group)
        lines += list(measure("portable", portable, problem, fp8, None, rates, machine, []))
        say(f"symmetric buffer: {nvlink.symmetric_bytes / 1e6:.0f} MB")
    facts = {"link_gb_s": rates.link / 1e3, "memory_gb_s": rates.memory / 1e3}
    save("normal", arguments.out, machine, vars(arguments) | facts, lines, functools.partial(draw, lines))
    dist.barrier()
    dist.destroy_process_group()


def measure(
    name: str,
    communicator: Communicator,
    problem: Problem,
    fp8: bool,
    sms: int | None,
    rates: Rates,
    machine: Machine,
    groups: list[int],
) -> Iterator[Line]:
    """Time every stage of one communicator, and exchanges in steps for each of ``groups``."""
    x, hidden, bytes_per_row = problem.x, problem.hidden, row_bytes(problem.hidden, fp8)
    layouts: tuple[RowLayout, ...] = ("rows", "expert_major")
    for layout in layouts:

        def dispatch(max_rows: int | None = None, layout: RowLayout = layout) -> object:
            return communicator.dispatch(
                x,
                problem.topk_idx,
                problem.topk_weights,
                num_experts=problem.experts,
                fp8=fp8,
                layout=layout,
                max_rows=max_rows,
                num_sms=sms,
            )

        written = problem.slots if layout == "expert_major" else problem.rows
        # Read to be pushed, written by peers, read again (own rows where they are), written to their places.
        local = x.numel() * 2 + (problem.remote_rows + problem.rows + written) * bytes_per_row
        floor = rates.floor(problem.remote_rows * bytes_per_row, local)
        kind = f"{'fp8' if fp8 else 'bf16'} {layout}"
        yield line(name, kind, sms, "dispatch", dispatch, floor, machine)
        if name == "nvlink":
            replay = capture(lambda call=dispatch, written=written: call(max_rows=written))  # type: ignore[misc]
            yield line(name, kind, sms, "dispatch, captured", replay, floor, machine)
    if fp8:
        return
    arrived = communicator.dispatch(x, problem.topk_idx, problem.topk_weights, num_experts=problem.experts, num_sms=sms)
    rows = torch.randn(problem.slots, hidden, device=x.device).to(x.dtype)
    assert arrived.weights is not None
    weights = arrived.weights
    calls: dict[str, Callable[[], object]] = {
        "combine": lambda: communicator.combine(rows, arrived.handle),
        "backward of combine": lambda: communicator.dispatch_cached(x, arrived.handle),
        "backward of dispatch": lambda: (
            communicator.combine(rows, arrived.handle),
            communicator.combine_weights(weights, arrived.handle),
        ),
    }
    for count in groups:
        calls[f"backward of combine, {count} steps"] = functools.partial(
            in_steps, communicator.dispatch_cached_in_groups, x, arrived.handle, count
        )
        calls[f"combine, {count} steps"] = functools.partial(
            in_steps, communicator.combine_in_groups, rows, arrived.handle, count
        )
    # Slots read once; a sum a row written and, of remote ones, read again; the result written.
    local = (problem.slots + 2 * problem.rows + len(x)) * bytes_per_row
    floor = rates.floor(problem.remote_rows * bytes_per_row, local)
    for what, call in calls.items():
        yield line(name, "bf16 expert_major", sms, what, call, floor, machine)
        if name == "nvlink":
            yield line(name, "bf16 expert_major", sms, f"{what}, captured", capture(call), floor, machine)


def in_steps(exchange: Callable[..., tuple[object, Iterator[None]]], *arguments: object) -> object:
    """The result of an exchange in steps, all of them one behind the other."""
    result, steps = exchange(*arguments)
    for _ in steps:
        pass
    return result


def line(
    name: str, kind: str, sms: int | None, what: str, call: Callable[[], object], floor: float, machine: Machine
) -> Line:
    """Time ``call`` on all ranks and print it."""
    times = time_call(call, machine, flush=True)
    result = Line(name, kind, sms, what, times.median, times.least, times.most, floor)
    say(
        f"{name:<12} {kind:<18} {sms or '':>4} {what:<28} {result.median:8.1f} {result.least:8.1f} {result.most:8.1f} "
        f"{floor:8.1f}"
    )
    return result


def draw(lines: list[Line], pyplot: Any) -> Any:
    """Time over SM budget, a panel for each kind of rows and operation."""
    panels = list(dict.fromkeys((entry.rows, entry.what) for entry in lines if entry.sms is not None))
    figure, axes = pyplot.subplots(-(-len(panels) // 3), 3, figsize=(12, 2.6 * -(-len(panels) // 3)), squeeze=False)
    for axis, (rows, what) in zip(axes.flat, panels, strict=False):
        ours = [entry for entry in lines if (entry.rows, entry.what) == (rows, what) and entry.sms is not None]
        axis.plot([entry.sms for entry in ours], [entry.median for entry in ours], "o-", label="nvlink")
        axis.axhline(ours[0].floor, color="gray", linestyle=":", label="floor")
        for entry in lines:
            if (entry.rows, entry.what) == (rows, what) and entry.sms is None:
                axis.axhline(entry.median, color="tab:orange", label=entry.communicator)
        axis.set(title=f"{what}\n{rows}", xlabel="SMs", ylabel="us", ylim=(0, None))
        axis.legend(fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    return figure


def parse_arguments() -> argparse.Namespace:
    """The shape, and the SM budgets to try."""
    parser = argparse.ArgumentParser(description="Normal-mode dispatch and combine.")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sms", type=int, nargs="+", default=[8, 16, 24, 32, 64, 104, 128])
    parser.add_argument("--groups", type=int, nargs="*", default=[], help="also exchanges in so many steps")
    parser.add_argument("--out", type=Path, help="folder for normal.json and normal.png")
    add_ranks_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
