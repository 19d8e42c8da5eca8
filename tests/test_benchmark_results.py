"""One file of the results of all benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

from merge import merge


def test_results_are_joined_and_missing_ones_named(tmp_path: Path) -> None:
    for name in ("normal", "layer"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmark": name, "lines": [1]}))
    assert merge(tmp_path, ["normal", "low_latency", "layer"]) == ["low_latency"]
    joined = json.loads((tmp_path / "results.json").read_text())
    assert joined["missing"] == ["low_latency"]
    assert joined["benchmarks"]["layer"] == {"benchmark": "layer", "lines": [1]}
    assert sorted(joined["benchmarks"]) == ["layer", "normal"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_nothing_missing(tmp_path: Path) -> None:
    (tmp_path / "normal.json").write_text("{}")
    assert merge(tmp_path, ["normal"]) == []
