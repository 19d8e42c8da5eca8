"""Which rows of a tensor are real, as kernels are told: ``csrc/include/real_rows.cuh``."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

from ep_moe.comm import PackedSegments
from ep_moe.experts.fp8 import Segments


class RealRows(ctypes.Structure):
    """``RealRows`` of ``real_rows.cuh``, which says what each field means."""

    _fields_ = (("counts", c_void_p), ("rows", c_int64), ("room", c_int32))


def real_rows(segments: Segments, rows: int) -> RealRows:
    """Of a tensor of ``rows`` rows in these segments; packed rows lie flat, a room behind the other."""
    if isinstance(segments, PackedSegments):
        return RealRows(segments.counts.data_ptr(), rows, segments.room)
    return RealRows(segments.ends[-1:].data_ptr(), rows, 0)
