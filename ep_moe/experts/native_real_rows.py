"""Which rows of a tensor are real, as kernels are told: ``csrc/include/real_rows.cuh``."""

from __future__ import annotations

from ep_moe.comm import PackedSegments
from ep_moe.comm.fp8_quantize import RealRows
from ep_moe.experts.fp8 import Segments


def real_rows(segments: Segments, rows: int) -> RealRows:
    """Of a tensor of ``rows`` rows in these segments; packed rows lie flat, a room behind the other."""
    if isinstance(segments, PackedSegments):
        return RealRows(segments.counts.data_ptr(), rows, segments.room)
    return RealRows(segments.ends[-1:].data_ptr(), rows, 0)
