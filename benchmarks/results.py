"""What a benchmark leaves behind: a JSON file, and a picture where matplotlib is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from machine import SHARED_WARNING, Machine, say


def save(
    name: str,
    folder: Path | None,
    machine: Machine,
    arguments: Mapping[str, object],
    lines: Sequence[Any],
    draw: Callable[[Any], Any],
) -> None:
    """Write ``NAME.json`` and ``NAME.png`` on rank 0.

    Args:
        name: of the benchmark.
        folder: to write to; ``None`` writes nothing.
        machine: where it ran.
        arguments: it ran with.
        lines: dataclasses, a line of the table each.
        draw: given ``matplotlib.pyplot``, returns the figure.
    """
    if folder is None or dist.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": name,
        "machine": machine.describe(),
        "arguments": {
            key: str(value) if isinstance(value, Path) else _finite(value) for key, value in arguments.items()
        },
        "lines": [{key: _finite(value) for key, value in asdict(line).items()} for line in lines],
    }
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    try:
        import matplotlib
    except ImportError:
        say("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(pyplot)
    if machine.shared:
        figure.suptitle(SHARED_WARNING, fontsize=8, color="tab:red")
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=120)


def _finite(value: object) -> object:
    """JSON knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
