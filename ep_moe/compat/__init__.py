"""Other libraries' interfaces over this library's core."""

from __future__ import annotations

import importlib
import sys

_REAL = "deep_ep"
_OURS = "ep_moe.compat.deep_ep"


def install() -> None:
    """Make ``import deep_ep`` mean :mod:`ep_moe.compat.deep_ep`, for programs that cannot be changed.

    Call it before anything imports ``deep_ep``. Calling it again changes nothing.

    Raises:
        RuntimeError: if another ``deep_ep`` has been imported already; nothing is replaced then.
    """
    ours = importlib.import_module(_OURS)
    present = sys.modules.get(_REAL)
    if present is not None and present is not ours:
        raise RuntimeError(
            f"deep_ep: already imported from {getattr(present, '__file__', 'elsewhere')}; "
            "call ep_moe.compat.install() before the first import of deep_ep"
        )
    sys.modules[_REAL] = ours
    sys.modules[f"{_REAL}.utils"] = importlib.import_module(f"{_OURS}.utils")


__all__ = ["install"]
