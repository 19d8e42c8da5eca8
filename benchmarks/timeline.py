"""A picture of a trace: which kernels ran when, on which stream, and which of them moved rows.

    python benchmarks/timeline.py results/trace/*.json

Each ``NAME.json``, as ``benchmarks/layer.py --trace`` and ``ep_moe.tracing.trace`` write it, gets a ``NAME.png`` beside
it. Copies and memory fills count as other work. What precedes the last delay of the GPU (``torch.cuda._sleep``) is left
out: behind one, the host is as far ahead as in a long run, and gaps between kernels are not its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLORS = {"GEMM": "tab:blue", "communication": "tab:orange", "other": "tab:gray"}
_GEMMS = ("gemm", "nvjet", "cutlass", "xmma")
_EXCHANGES = (
    "layout_kernel",
    "copy_kernel",
    "quantize_kernel",
    "dispatch_kernel",
    "combine_kernel",
    "weights_kernel",
    "node_exchange_kernel",
)
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_DELAY = "spin_kernel"


@dataclass(frozen=True)
class Span:
    """Work on a GPU; microseconds, from the start of the first."""

    stream: int
    start: float
    length: float
    kind: str


def read_spans(path: Path) -> list[Span]:
    """All work on the GPU in a trace, behind its last delay if there is one, by start.

    Raises:
        ValueError: if there is none.
    """
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") in _ON_GPU]
    if not events:
        raise ValueError(f"{path}: no work on a GPU in this trace")
    begin = max((event["ts"] + event["dur"] for event in events if _DELAY in event["name"]), default=0.0)
    events = [event for event in events if event["ts"] >= begin]
    first = min(event["ts"] for event in events)
    spans = [
        Span(event["args"]["stream"], event["ts"] - first, event["dur"], kind_of(event["name"])) for event in events
    ]
    return sorted(spans, key=lambda span: span.start)


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name: a key of :data:`COLORS`."""
    name = kernel.lower()
    if "nccl" in name or ("ep_moe" in name and any(part in name for part in _EXCHANGES)):
        return "communication"
    return "GEMM" if any(part in name for part in _GEMMS) else "other"


def hidden_share(spans: Sequence[Span]) -> float:
    """The part of the time of communication during which something else ran too; 0 if there is no communication."""
    others = [(span.start, span.start + span.length) for span in spans if span.kind != "communication"]
    total = hidden = 0.0
    for span in spans:
        if span.kind != "communication":
            continue
        total += span.length
        reached = span.start  # others overlap: count no time twice
        for start, end in sorted(others):
            start, end = max(start, reached), min(end, span.start + span.length)
            if end > start:
                hidden, reached = hidden + end - start, end
    return hidden / total if total else 0.0


def draw(spans: Sequence[Span], title: str, pyplot: Any) -> Any:
    """A line for each stream, in the order in which they begin."""
    streams = list(dict.fromkeys(span.stream for span in spans))
    figure, axis = pyplot.subplots(figsize=(14, 1.2 + 0.6 * len(streams)))
    for kind, color in COLORS.items():
        for line, stream in enumerate(streams):
            bars = [(s.start / 1e3, s.length / 1e3) for s in spans if s.stream == stream and s.kind == kind]
            axis.broken_barh(bars, (line - 0.4, 0.8), color=color, label=None if line else kind)
    axis.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
    axis.invert_yaxis()
    axis.set(xlabel="ms", title=f"{title}: {hidden_share(spans):.0%} of communication behind something else")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    figure.tight_layout()
    return figure


def draw_traces(paths: Sequence[Path]) -> None:
    """Write the picture of each trace, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed", flush=True)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for path in paths:
        figure = draw(read_spans(path), path.stem, pyplot)
        figure.savefig(path.with_suffix(".png"), dpi=120)
        pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pictures of traces.")
    parser.add_argument("traces", nargs="+", type=Path, help="JSON files")
    draw_traces(parser.parse_args().traces)
