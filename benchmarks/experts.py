"""The experts of one rank: forward, dgrad and wgrad of both projections for every grouped GEMM back end.

    python benchmarks/experts.py --ranks 1 --shapes deepseek_v3 mixtral_8x7b --out results

bf16; a rank's share of 4,096 tokens a rank, no communication (several ranks do the same side by side). ``random``
counts are those of uniform routing, ``skewed`` ones of experts with log-normal popularity. ``sum`` adds the medians of
forward, dgrad and wgrad; ``experts`` is the module with its activation and routing weights, gradients written, not
accumulated. The floor of a GEMM is the larger of its operations over the rate of a large GEMM and its bytes over that
of a large copy, both measured here. Wasted is the share of tile rows that hold no token, with tiles of 64, 128 or 256
rows, and with one height for each expert, as low as it can be.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.config import ConfigError, ExpertsConfig
from ep_moe.config_fields import field_types
from ep_moe.experts.gemm import GroupedGemm
from ep_moe.experts.grouped import GroupedExperts
from gemm_cost import GemmWork, gemm_work, random_counts, wasted_share, wasted_share_fitted
from machine import Machine, add_ranks_argument, launch, measure_rates, say, start
from results import save
from shapes import SHAPES, TWO_GPU_SHAPES, Shape, gemm_of
from timing import Spread, time_call

BACKENDS = [name for name in get_args(field_types(ExpertsConfig)["backend"]) if name != "auto"]
PROJECTIONS = ("fc1", "fc2")
PARTS = ("forward", "dgrad", "wgrad")
SQUARE = 8192  # of the GEMM whose rate counts as possible


@dataclass(frozen=True)
class Line:
    """One line of the table; milliseconds, NaN where skipped. ``tflops`` counts real rows only."""

    shape: str
    counts: str
    backend: str
    projection: str
    what: str
    median: float
    least: float
    most: float
    floor: float
    tflops: float
    skipped: str | None = None


@dataclass(frozen=True)
class Waste:
    """Share of tile rows without a token, by rows of a tile."""

    shape: str
    counts: str
    shares: dict[str, float]


@dataclass(frozen=True)
class Case:
    """One shape and counts on this machine; rates in operations and bytes a millisecond."""

    machine: Machine
    name: str
    shape: Shape
    kind: str
    counts: list[int]
    gemm_rate: float
    memory_rate: float

    @property
    def segments(self) -> ExpertSegments:
        """The counts, sizes known on the host."""
        counts = torch.tensor(self.counts, device=self.machine.device)
        return ExpertSegments(counts, counts.cumsum(0).int(), tuple(self.counts))

    def work(self, projection: str) -> GemmWork:
        """Of each GEMM of a projection."""
        widths = (self.shape.hidden, 2 * self.shape.ffn) if projection == "fc1" else (self.shape.ffn, self.shape.hidden)
        return gemm_work(self.counts, *widths)

    def floor(self, projection: str) -> float:
        """Milliseconds that each GEMM of a projection takes at least."""
        work = self.work(projection)
        return max(work.flops / self.gemm_rate, work.bytes / self.memory_rate)

    def line(self, backend: str, projection: str, what: str, spread: Spread, gemms: int = 1) -> Line:
        """The line of a time in microseconds that holds ``gemms`` GEMMs of each projection named."""
        names = PROJECTIONS if projection == "both" else (projection,)
        median, least, most = (microseconds / 1e3 for microseconds in (spread.median, spread.least, spread.most))
        floor = gemms * sum(self.floor(name) for name in names)
        flops = gemms * sum(self.work(name).flops for name in names)
        tflops = flops / median / 1e9
        return Line(self.name, self.kind, backend, projection, what, median, least, most, floor, tflops)


def main() -> None:
    """Measure the shapes asked for."""
    arguments = parse_arguments()
    launch(arguments.ranks)
    machine = start()
    gemm_rate, memory_rate = measure_gemm_rate(machine), measure_rates(machine).memory * 1e3
    say(f"rate of a GEMM of {SQUARE}^3: {gemm_rate / 1e9:.0f} TFLOP/s")
    say(
        f"{'shape':<16} {'counts':<7} {'back end':<11} {'projection':<10} {'what':<18} "
        f"{'median':>8} {'min':>8} {'max':>8} {'floor':>8} ms {'TFLOP/s':>8}"
    )
    lines: list[Line] = []
    wastes = []
    for name in arguments.shapes:
        shape = SHAPES[name]
        for kind in arguments.counts:
            rows = arguments.tokens * shape.top_k
            counts = random_counts(rows, shape.local_experts, kind == "skewed", seed=1 + dist.get_rank())
            case = Case(machine, name, shape, kind, counts, gemm_rate, memory_rate)
            wastes.append(waste(case))
            for backend in arguments.backends:
                lines += map(shown, measure(case, backend))
    facts = {"gemm_tflops": gemm_rate / 1e9, "memory_gb_s": memory_rate / 1e6, "wasted": [vars(w) for w in wastes]}
    save("experts", arguments.out, machine, vars(arguments) | facts, lines, functools.partial(draw, lines))
    dist.barrier()
    dist.destroy_process_group()


def measure(case: Case, backend: str) -> Iterator[Line]:
    """Lines of one back end."""
    shape, device = case.shape, case.machine.device
    try:
        gemm = gemm_of(shape, backend, device)
    except ConfigError as error:
        none = Spread(math.nan, math.nan, math.nan)
        yield replace(case.line(backend, "both", "sum", none, len(PARTS)), skipped=str(error))
        return
    experts = make_experts(case, backend)
    medians = dict.fromkeys(PARTS, 0.0)
    for projection in PROJECTIONS:
        weight = experts.fc1_weight if projection == "fc1" else experts.fc2_weight
        spreads = time_parts(case, gemm, weight.detach())
        for part, spread in spreads.items():
            yield case.line(backend, projection, part, spread)
            medians[part] += spread.median
        yield case.line(backend, projection, "sum", sum_of(s.median for s in spreads.values()), len(PARTS))
    for part, total in medians.items():
        yield case.line(backend, "both", part, sum_of([total]))
    yield case.line(backend, "both", "sum", sum_of(medians.values()), len(PARTS))
    forward, both = time_experts(case, experts)
    yield case.line(backend, "both", "experts, forward", forward)
    yield case.line(backend, "both", "experts, all", both, len(PARTS))


def make_experts(case: Case, backend: str) -> GroupedExperts:
    """The module, with normal weights."""

    def init(weight: Tensor) -> Tensor:
        return weight.normal_(std=0.02)

    return GroupedExperts(
        case.shape.hidden,
        case.shape.local_experts,
        ExpertsConfig(ffn_hidden_size=case.shape.ffn, activation="swiglu", backend=backend),  # type: ignore[arg-type]
        init_method=init,
        output_init_method=init,
        device=case.machine.device,
        dtype=torch.bfloat16,
    )


def time_parts(case: Case, gemm: GroupedGemm, weight: Tensor) -> dict[str, Spread]:
    """Forward and both gradients of one projection."""
    segments, device = case.segments, case.machine.device
    rows = torch.randn(sum(case.counts), weight.shape[2], device=device, dtype=torch.bfloat16)
    grad = torch.randn(sum(case.counts), weight.shape[1], device=device, dtype=torch.bfloat16)
    return {
        "forward": time_call(lambda: gemm.forward(rows, weight, segments), case.machine),
        "dgrad": time_call(lambda: gemm.dgrad(grad, weight, segments), case.machine),
        "wgrad": time_call(lambda: gemm.wgrad(grad, rows, segments), case.machine),
    }


def time_experts(case: Case, experts: GroupedExperts) -> tuple[Spread, Spread]:
    """The module forward, as inference runs it, and forward plus backward."""
    segments, device = case.segments, case.machine.device
    rows = torch.randn(sum(case.counts), case.shape.hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    weights = torch.rand(len(rows), device=device).requires_grad_()
    grad = torch.randn_like(rows)
    leaves = (rows, weights, *experts.parameters())

    def forward() -> Tensor:
        with torch.no_grad():
            return experts(rows, weights, segments)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(experts(rows, weights, segments), leaves, grad)

    return time_call(forward, case.machine), time_call(both, case.machine)


def sum_of(medians: Any) -> Spread:
    """A sum of medians, of which no spread is known."""
    return Spread(sum(medians), math.nan, math.nan)


def measure_gemm_rate(machine: Machine) -> float:
    """Operations a millisecond of a large bf16 GEMM on all ranks at once."""
    a, b = (torch.randn(SQUARE, SQUARE, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    return 2e3 * SQUARE**3 / time_call(lambda: a @ b, machine).median


def waste(case: Case) -> Waste:
    """Print and return the shares of tile rows without a token."""
    shares = {str(tile): wasted_share(case.counts, tile) for tile in (64, 128, 256)}
    shares["fitted"] = wasted_share_fitted(case.counts)
    text = ", ".join(f"{tile}: {share:.1%}" for tile, share in shares.items())
    say(f"{case.name}, {case.kind}: {min(case.counts)} to {max(case.counts)} rows an expert; tile rows wasted {text}")
    return Waste(case.name, case.kind, shares)


def shown(line: Line) -> Line:
    """Print a line."""
    head = f"{line.shape:<16} {line.counts:<7} {line.backend:<11} {line.projection:<10} {line.what:<18} "
    figures = f"{line.median:8.3f} {line.least:8.3f} {line.most:8.3f} {line.floor:8.3f}    {line.tflops:8.0f}"
    say(head + (figures if line.skipped is None else f"skipped: {line.skipped}"))
    return line


def draw(lines: list[Line], pyplot: Any) -> Any:
    """Bars of TFLOP/s of both projections, a panel for each part and kind of counts."""
    kinds, shapes, backends = (
        list(dict.fromkeys(getattr(line, name) for line in lines if line.skipped is None))
        for name in ("counts", "shape", "backend")
    )
    parts = [*PARTS, "sum", "experts, all"]
    figure, axes = pyplot.subplots(len(kinds), len(parts), figsize=(4 * len(parts), 3.6 * len(kinds)), squeeze=False)
    width = 0.8 / max(len(backends), 1)
    for row, kind in zip(axes, kinds, strict=True):
        for axis, part in zip(row, parts, strict=True):
            chosen = [x for x in lines if (x.counts, x.projection, x.what) == (kind, "both", part)]
            for number, backend in enumerate(backends):
                bars = {x.shape: x for x in chosen if x.backend == backend and x.skipped is None}
                places = [shapes.index(name) + number * width for name in bars]
                axis.bar(places, [x.tflops for x in bars.values()], width, label=backend)
            floors = {x.shape: x.tflops * x.median / x.floor for x in chosen if x.skipped is None}
            for name, rate in floors.items():
                left = shapes.index(name) - width / 2
                axis.hlines(rate, left, left + 0.8, color="black", linewidth=1)
            axis.set(title=f"{part}, {kind} (line: floor)", ylabel="TFLOP/s")
            axis.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right", fontsize=7)
            axis.margins(y=0.2)  # room for the legend above the floor
            axis.legend(fontsize=7, loc="upper center", ncols=max(len(backends), 1))
    return figure


def parse_arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description="The experts of one rank.")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=TWO_GPU_SHAPES)
    parser.add_argument("--counts", nargs="+", choices=["random", "skewed"], default=["random", "skewed"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--out", type=Path, help="folder for experts.json and experts.png")
    add_ranks_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
