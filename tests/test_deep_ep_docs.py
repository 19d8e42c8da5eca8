"""The code of docs/deep_ep.md runs as it stands, in order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from communicators import use_deep_ep
from ranks import run_ranks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "deep_ep.md"


def _run_page(rank: int, world: int) -> int:
    use_deep_ep("cpu", rank)
    names: dict[str, Any] = {}
    pieces = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    try:
        for piece in pieces:
            exec(piece, names)
    finally:
        for name in ("deep_ep", "deep_ep.utils"):
            sys.modules.pop(name, None)
    return len(pieces)


def test_examples_of_the_page() -> None:
    assert run_ranks(2, _run_page) == [7, 7]
