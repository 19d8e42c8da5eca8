"""Ranges and timelines: every stage has its ranges, in order, and results do not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_overlap import build_layer, results_of, tokens_of
from torch import nn

from ep_moe.tracing import annotate_stages, trace

STAGES = ("route", "dispatch", "experts", "combine")


class Model(nn.Module):
    """Two layers, so that their names differ."""

    def __init__(self, rank: int, device: str, overlap: tuple[Any, ...]) -> None:
        super().__init__()
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.blocks = nn.ModuleList(build_layer(rank, device, overlap, dtype) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def _traced(rank: int, world: int, device: str, overlap: tuple[Any, ...], path: str) -> list[bool]:
    model = Model(rank, device, overlap)
    like = next(model.parameters())
    same = []

    def passes() -> list[dict[str, torch.Tensor]]:
        found = []
        for seed in (0, 1):
            x, upstream = tokens_of(rank, seed, like)
            model.zero_grad()
            out = model(x)
            out.backward(upstream)
            found.append(results_of(model, x, out))
        return found

    plain = passes()
    with trace(f"{path}/rank{rank}.json", model):
        traced = passes()
    assert all(block.ranges.layer is None for block in model.blocks)
    annotate_stages(model)
    annotated = passes()
    annotate_stages(model, on=False)
    for other in (traced, annotated):
        same += [torch.equal(a[name], b[name]) for a, b in zip(plain, other, strict=True) for name in a]
    return same


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("overlap", [(), ("shared_experts", "wgrad")], ids=["plain", "overlap"])
def test_every_stage_has_its_ranges(device: str, overlap: tuple[Any, ...], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    for same in run_ranks(2, _traced, device, overlap, str(folder)):
        assert same and all(same)
    for rank in range(2):
        events = json.loads((folder / f"rank{rank}.json").read_text())["traceEvents"]
        ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("blocks.")]
        ranges.sort(key=lambda event: event["ts"])
        names = [event["name"] for event in ranges]
        forward = [f"blocks.{layer} {stage}" for layer in range(2) for stage in STAGES]
        backward = [f"{name} backward" for name in reversed(forward)]
        assert names == 2 * (forward + backward)
        ends = [event["ts"] + event["dur"] for event in ranges]
        assert all(end <= later["ts"] + 1 for end, later in zip(ends, ranges[1:], strict=False))


def test_nothing_is_written_if_the_block_raises(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside"), trace(tmp_path / "trace.json", nn.Linear(1, 1)):
        raise RuntimeError("inside")
    assert not list(tmp_path.iterdir())
