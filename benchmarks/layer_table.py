"""The table and the picture of ``benchmarks/layer.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

HEADER = (
    f"{'':<67} | {'layer, ms':^15} | {'GEMMs alone':^15} | {'exchanges alone':^15} | {'compute alone':^15} | "
    f"{'layer/GEMMs':^11} | {'hidden':^11} |\n"
    f"{'shape':<17} {'layer, experts':<24} {'overlap':<20} SMs"
    + " |     fwd    both" * 4
    + " |   fwd  both" * 2
    + " | peak GiB"
)


@dataclass(frozen=True)
class Line:
    """One line of the table: milliseconds, shares, and GiB that a step takes beyond weights and inputs.

    Attributes:
        layer: ``ep_moe``, or a peer.
        backend: what computes the experts.
        exchanges_forward: dispatch and combine alone.
        computation_forward: everything else alone.
        hidden_forward: the share of the exchanges that the layer hides.
        skipped: why nothing was measured, if nothing was.
    """

    shape: str
    experts: int
    layer: str
    backend: str
    overlap: str = "none"
    sms: int | None = None
    forward: float = math.nan
    both: float = math.nan
    gemms_forward: float = math.nan
    gemms_both: float = math.nan
    exchanges_forward: float = math.nan
    exchanges_both: float = math.nan
    computation_forward: float = math.nan
    computation_both: float = math.nan
    hidden_forward: float = math.nan
    hidden_both: float = math.nan
    peak_gib: float = math.nan
    skipped: str = ""


def format_line(line: Line) -> str:
    """As printed under :data:`HEADER`."""
    if line.skipped:
        return f"{line.shape:<17} {line.layer}: skipped, {line.skipped}"
    label = f"{line.shape:<17} {line.layer + ', ' + line.backend:<24} {line.overlap:<20} {line.sms or '':>3}"
    pairs = (
        (line.forward, line.both),
        (line.gemms_forward, line.gemms_both),
        (line.exchanges_forward, line.exchanges_both),
        (line.computation_forward, line.computation_both),
    )
    ratios = (line.forward / line.gemms_forward, line.both / line.gemms_both)
    cells = [f"{_cell(forward, '.2f', 7)} {_cell(both, '.2f', 7)}" for forward, both in pairs]
    cells.append(f"{_cell(ratios[0], '.2f', 5)} {_cell(ratios[1], '.2f', 5)}")
    cells.append(f"{_cell(line.hidden_forward, '.0%', 5)} {_cell(line.hidden_both, '.0%', 5)}")
    return f"{label} | {' | '.join(cells)} | {line.peak_gib:8.1f}"


def _cell(value: float, form: str, width: int) -> str:
    return f"{'-' if math.isnan(value) else format(value, form):>{width}}"


def draw(lines: list[Line], pyplot: Any) -> Any:
    """Bars of the layers, a line where the GEMMs alone are."""
    lines = [line for line in lines if not line.skipped]
    labels = [
        f"{x.shape}\n{'' if x.layer == 'ep_moe' else x.layer + ', '}{x.backend}, {x.overlap}"
        + ("" if x.sms is None else f", {x.sms} SMs")
        for x in lines
    ]
    colors = ["tab:blue" if line.layer == "ep_moe" else "tab:gray" for line in lines]
    figure, axes = pyplot.subplots(1, 2, figsize=(max(14, 0.7 * len(lines)), 5))
    for axis, whole, gemms in ((axes[0], "forward", "gemms_forward"), (axes[1], "both", "gemms_both")):
        axis.bar(labels, [getattr(x, whole) for x in lines], 0.6, color=colors, label="layer (gray: others')")
        for place, line in enumerate(lines):
            least = getattr(line, gemms)
            axis.hlines(least, place - 0.3, place + 0.3, color="black", label=None if place else "its GEMMs alone")
        axis.set(title="forward" if whole == "forward" else "forward + backward", ylabel="ms")
        axis.tick_params(axis="x", labelrotation=90 if len(lines) > 12 else 30, labelsize=7)
        axis.legend()
    return figure
