"""Join the results of benchmarks in one file: ``python benchmarks/merge.py FOLDER NAME...`` writes ``results.json``.

Fails, naming them, if results of a benchmark are missing; the file then lacks these alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def merge(folder: Path, names: Sequence[str]) -> list[str]:
    """Write ``results.json`` from ``NAME.json`` of each benchmark, and remove these; returns the missing ones."""
    parts = {name: folder / f"{name}.json" for name in names}
    missing = [name for name, path in parts.items() if not path.exists()]
    found = {name: json.loads(path.read_text()) for name, path in parts.items() if name not in missing}
    (folder / "results.json").write_text(json.dumps({"benchmarks": found, "missing": missing}, indent=1) + "\n")
    for name in found:
        parts[name].unlink()
    return missing


if __name__ == "__main__":
    absent = merge(Path(sys.argv[1]), sys.argv[2:])
    sys.exit(f"no results of {', '.join(absent)}" if absent else 0)
