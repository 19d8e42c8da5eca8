"""What a training run shows and leaves behind: progress, ``metrics.csv``, ``curves.png`` and a final table."""

from __future__ import annotations

import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

COLUMNS = (
    "step",
    "train_loss",
    "validation_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "dropped_fraction",
    "load_min",
    "load_max",
    "routing_entropy",
    "elapsed_s",
)
Row = dict[str, float | None]

_BLUE, _RED, _GREY = "#2a6fbb", "#d1495b", "#555555"


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one logged step.

    Attributes:
        step: optimizer steps done, larger than that of the row before.
        train_loss: nats per byte.
        learning_rate: of that step.
        grad_norm: before clipping.
        tokens_per_second: over all processes, since the row before.
        validation_loss: nats per byte; None if not evaluated.
        dropped_fraction: share of the (token, expert) pairs dropped beyond capacity; None without MoE layers.
        expert_load: per MoE layer the assignments of each expert, divided by the fair share (1 is even).
        routing_entropy: nats, mean over tokens and MoE layers; None without MoE layers.
    """

    step: int
    train_loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    validation_loss: float | None = None
    dropped_fraction: float | None = None
    expert_load: Sequence[Sequence[float]] = ()
    routing_entropy: float | None = None


class RunReport:
    """The report of one run, written by one process.

    Usage: :meth:`advance` after every step, :meth:`log` at some of them, :meth:`finish` once.

    Args:
        output_dir: folder of ``metrics.csv`` and ``curves.png``; made if missing.
        enabled: False on all processes but one, where every method then does nothing.
        total_steps: steps of the whole run, for the progress bar.
        resumed_step: steps done before this start. 0 begins a new ``metrics.csv``; otherwise the rows up to that
            step are kept and later ones, which will be repeated, removed.
        bigram_loss: of :func:`moe_gpt.bigram.bigram_loss`, nats per byte, as a line to compare with.
    """

    def __init__(
        self,
        output_dir: str | Path,
        enabled: bool,
        total_steps: int,
        resumed_step: int = 0,
        bigram_loss: float | None = None,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self.csv_path = Path(output_dir) / "metrics.csv"
        self.curves_path = Path(output_dir) / "curves.png"
        self.bigram_loss = bigram_loss
        self.total_steps = total_steps
        self.rows = read_metrics(self.csv_path, resumed_step) if resumed_step else []
        self._expert_load: Sequence[Sequence[float]] = ()
        self.csv_path.parent.mkdir(parents=True, exist_ok=True)
        _write_metrics(self.csv_path, self.rows)
        # Time of earlier starts counts on: elapsed_s never falls along the file.
        self._start = time.perf_counter() - ((self.rows[-1]["elapsed_s"] or 0.0) if self.rows else 0.0)
        self._bar = tqdm(
            total=total_steps, initial=resumed_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.enabled:
            self._bar.update()

    def message(self, text: str) -> None:
        """Print one line on stderr without breaking the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def log(self, metrics: StepMetrics) -> None:
        """Append a row to ``metrics.csv`` and show it; after a validation also redraw ``curves.png``."""
        if not self.enabled:
            return
        loads = [load for layer in metrics.expert_load for load in layer]
        row: Row = {column: getattr(metrics, column, None) for column in COLUMNS}
        row["load_min"], row["load_max"] = (min(loads), max(loads)) if loads else (None, None)
        row["elapsed_s"] = time.perf_counter() - self._start
        self.rows.append(row)
        self._expert_load = metrics.expert_load or self._expert_load
        with self.csv_path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(_format_row(row))
        self._show(metrics, row)
        if metrics.validation_loss is not None:
            # A run that is killed later still leaves its curves.
            draw_curves(self.curves_path, self.rows, self.bigram_loss, self._expert_load)

    def _show(self, metrics: StepMetrics, row: Row) -> None:
        """Figures on the progress bar; as a line where there is no bar, and for every validation."""
        figures = [f"loss {metrics.train_loss:.4f}"]
        if metrics.validation_loss is not None:
            figures.append(f"validation {metrics.validation_loss:.4f}")
        figures.append(f"lr {metrics.learning_rate:.2e}")
        figures.append(f"{metrics.tokens_per_second:,.0f} tokens/s")
        if row["load_max"] is not None:
            figures.append(f"load {row['load_min']:.2f}..{row['load_max']:.2f}")
        self._bar.set_postfix_str(", ".join(figures))
        if self._bar.disable or metrics.validation_loss is not None:
            self.message(f"step {metrics.step}/{self.total_steps}: " + ", ".join(figures))

    def finish(self) -> None:
        """Close the progress bar, draw ``curves.png`` and print the summary on stdout."""
        if not self.enabled:
            return
        self._bar.close()
        draw_curves(self.curves_path, self.rows, self.bigram_loss, self._expert_load)
        print(format_summary(self.rows, self.bigram_loss), flush=True)
        print(f"Metrics: {self.csv_path}\nCurves:  {self.curves_path}", flush=True)


def read_metrics(path: Path, last_step: int) -> list[Row]:
    """Rows of a ``metrics.csv`` up to ``last_step``; none if there is no such file.

    A line that is not a full row (the last one of a killed run) is passed over.
    """
    rows: list[Row] = []
    if not path.exists():
        return rows
    with path.open(newline="", encoding="utf-8") as file:
        for cells in csv.reader(file):
            try:
                row: Row = {c: float(cell) if cell else None for c, cell in zip(COLUMNS, cells, strict=True)}
            except ValueError:  # the header, or a broken line
                continue
            if row["step"] is not None and row["step"] <= last_step:
                rows.append(row)
    return rows


def format_summary(rows: Sequence[Row], bigram_loss: float | None) -> str:
    """A small table of how the run went, from the rows of ``metrics.csv``."""
    if not rows:
        return "No step was logged."
    last = rows[-1]
    table = [("steps", f"{last['step']:.0f}"), ("training loss", _format_loss(_column(rows, "train_loss")[-1]))]
    validation = _column(rows, "validation_loss")
    if validation:
        table += [
            ("validation loss, last", _format_loss(validation[-1])),
            ("validation loss, best", _format_loss(min(validation))),
        ]
    if bigram_loss is not None:
        table.append(("bigram model", _format_loss(bigram_loss)))
    table.append(("tokens per second", f"{statistics.median(_column(rows, 'tokens_per_second')):,.0f} (median)"))
    if last["load_max"] is not None:
        table.append(("expert load, last", f"{last['load_min']:.2f} to {last['load_max']:.2f} of the fair share"))
    if last["dropped_fraction"] is not None:
        table.append(("dropped pairs, last", f"{last['dropped_fraction']:.2%}"))
    if last["routing_entropy"] is not None:
        table.append(("routing entropy, last", f"{last['routing_entropy']:.3f} nats"))
    table.append(("elapsed", f"{last['elapsed_s']:.1f} s"))
    width = max(len(name) for name, _ in table)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in table)


def draw_curves(
    path: Path, rows: Sequence[Row], bigram_loss: float | None, expert_load: Sequence[Sequence[float]]
) -> None:
    """Draw the losses and, where there are experts, their load over the steps and in the last row.

    Args:
        path: of the PNG.
        rows: of ``metrics.csv``.
        bigram_loss: nats per byte, drawn as a dashed line; None for no line.
        expert_load: of the last row, as in :class:`StepMetrics`; may be empty.
    """
    has_load = any(row["load_max"] is not None for row in rows)
    heights = [2.0] + [1.4] * has_load + [1.2] * bool(expert_load)
    figure = Figure(figsize=(8, 2 * sum(heights)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # draws into memory: needs no display and touches no global state
    panels = iter(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    _draw_losses(next(panels), rows, bigram_loss)
    if has_load:
        _draw_load(next(panels), rows)
    if expert_load:
        _draw_load_map(next(panels), expert_load)
    figure.savefig(path)


def _draw_losses(axes: Axes, rows: Sequence[Row], bigram_loss: float | None) -> None:
    axes.plot(*_curve(rows, "train_loss"), color=_BLUE, linewidth=1.3, label="training")
    axes.plot(*_curve(rows, "validation_loss"), color=_RED, marker="o", markersize=4, label="validation")
    if bigram_loss is not None:
        axes.axhline(bigram_loss, color=_GREY, linestyle="--", label=f"bigram model ({bigram_loss:.3f})")
    axes.set(title="Loss", xlabel="optimizer step", ylabel="nats per byte")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_load(axes: Axes, rows: Sequence[Row]) -> None:
    (steps, lowest), (_, highest) = _curve(rows, "load_min"), _curve(rows, "load_max")
    axes.fill_between(steps, lowest, highest, color=_BLUE, alpha=0.15)
    axes.plot(steps, highest, color=_RED, linewidth=1.3, label="busiest expert of any layer")
    axes.plot(steps, lowest, color=_BLUE, linewidth=1.3, label="idlest expert of any layer")
    axes.axhline(1.0, color=_GREY, linestyle="--", label="fair share")
    axes.set(title="Expert load", xlabel="optimizer step", ylabel="load / fair share")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_load_map(axes: Axes, expert_load: Sequence[Sequence[float]]) -> None:
    """Heat map of experts by layers: white is the fair share, red above it, blue below."""
    layers, experts = len(expert_load), len(expert_load[0])
    highest = max(max(layer) for layer in expert_load)
    image = axes.imshow(
        expert_load, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, highest))
    )
    axes.figure.colorbar(image, ax=axes, label="load / fair share")
    axes.set(title="Expert load in the last logged interval", xlabel="expert", ylabel="MoE layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if experts <= 16 and layers <= 8:  # more numbers would not be legible
        for layer, loads in enumerate(expert_load):
            for expert, load in enumerate(loads):
                # Both ends of the colour map are dark.
                color = "white" if load < 0.3 or load > 1 + 0.7 * (max(2.0, highest) - 1) else "black"
                axes.text(expert, layer, f"{load:.2f}", ha="center", va="center", fontsize=8, color=color)


def _write_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file at once: a run killed in the middle leaves the old file or the new one."""
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_format_row(row) for row in rows)
    os.replace(temporary, path)


def _format_row(row: Row) -> list[str]:
    cells = (row[column] for column in COLUMNS)
    return ["" if value is None else f"{value:.8g}" for value in cells]


def _format_loss(nats: float) -> str:
    return f"{nats:.4f} nats per byte ({nats / math.log(2):.4f} bits)"


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := row[name]) is not None]


def _curve(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have the column."""
    points = [(step, value) for row in rows if (value := row[name]) is not None and (step := row["step"]) is not None]
    return [step for step, _ in points], [value for _, value in points]
