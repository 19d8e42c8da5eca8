"""The arguments of the CUDA entry points: the structs of ``csrc/``, field by field.

The sources say what each field means.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_uint64, c_void_p

from ep_moe import native

MAX_RANKS = 8
MAX_NODES = 32
MAX_TOP_K = 32
MAX_EXPERTS = 1024
CHUNK_TOKENS = 32
COMBINE_GROUP = 8
WORKSPACE_WORDS = 8
REPORTED, DISPATCHES = 5, 6  # of these

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # Element
TO_SLOTS, FROM_SLOTS, SUMS = 0, 1, 2  # Direction of weights.cu

FAULT_TIMEOUT, FAULT_EXPERT_RANGE, FAULT_OVERFLOW, FAULT_TOKENS = 1, 2, 3, 4
STEPS = {
    1: "routing",
    2: "rows",
    3: "combined rows",
    4: "routing weights",
    5: "call of combine",
    6: "rows between nodes",
}


class BufferShape(ctypes.Structure):
    """``BufferShape`` of ``buffer.cuh``."""

    _fields_ = (
        ("ranks", c_int32),
        ("max_tokens", c_int32),
        ("max_top_k", c_int32),
        ("row_places", c_int32),
        ("max_row_bytes", c_int64),
    )


class BufferLayout(ctypes.Structure):
    """``BufferLayout`` of ``buffer.cuh``."""

    _fields_ = tuple(
        (name, c_int64)
        for name in (
            "entered",
            "chunk_flags",
            "ready",
            "landed",
            "arrivals",
            "landing_flags",
            "weight_flags",
            "routing",
            "weights",
            "rows",
            "landing",
            "total",
        )
    )


class FaultReport(ctypes.Structure):
    """``FaultReport`` of ``communicator.cuh``."""

    _fields_ = (
        ("fault", c_uint32),
        ("step", c_uint32),
        ("rank", c_int32),
        ("round", c_uint32),
        ("value", c_int64),
        ("allowed", c_int64),
    )


class CommunicatorArgs(ctypes.Structure):
    """``Communicator`` of ``communicator.cuh``."""

    _fields_ = (
        ("buffers", c_void_p * MAX_RANKS),
        ("layout", BufferLayout),
        ("shape", BufferShape),
        ("workspace", c_void_p),
        ("report", c_void_p),
        ("timeout_ns", c_uint64),
        ("rank", c_int32),
        ("blocks", c_int32),
    )


class NodeChunks(ctypes.Structure):
    """``NodeChunks`` of ``node_chunks.cuh``."""

    _fields_ = (("first", c_void_p), ("nodes", c_int32), ("most", c_int32))


class LayoutArgs(ctypes.Structure):
    """``LayoutArgs`` of ``layout.cu``."""

    _fields_ = (
        ("comm", CommunicatorArgs),
        ("topk_idx", c_void_p),
        ("topk_weights", c_void_p),
        ("slots", c_void_p),
        ("rows", c_void_p),
        ("row_of_slot", c_void_p),
        ("owners", c_void_p),
        ("slot_weights", c_void_p),
        ("received_topk_idx", c_void_p),
        ("received_topk_weights", c_void_p),
        ("rows_per_rank", c_void_p),
        ("counts", c_void_p),
        ("ends", c_void_p),
        ("histogram", c_void_p),
        ("host_counts", c_void_p),
        ("tokens", c_int32),
        ("top_k", c_int32),
        ("num_experts", c_int32),
        ("alignment", c_int32),
        ("max_rows", c_int32),
        ("max_received", c_int32),
        ("nodes", NodeChunks),
        ("shifts", c_void_p),
    )


class PushArgs(ctypes.Structure):
    """``PushArgs`` of ``push.cu``."""

    _fields_ = (
        ("comm", CommunicatorArgs),
        ("x", c_void_p),
        ("scales", c_void_p),
        ("topk_idx", c_void_p),
        ("x_row_bytes", c_int32),
        ("wire_bytes", c_int32),
        ("row_bytes", c_int32),
        ("row_scales", c_int32),
        ("tokens", c_int32),
        ("top_k", c_int32),
        ("num_experts", c_int32),
        ("element", c_int32),
        ("quantize", c_int32),
        ("own", c_int32),
        ("warps", c_int32),
        ("stages", c_int32),
        ("stage_bytes", c_int32),
        ("early", c_int32),
    )


class ExpertRange(ctypes.Structure):
    """``ExpertRange`` of ``expert_range.cuh``."""

    _fields_ = (("first", c_int32), ("end", c_int32), ("experts", c_int32))


class DispatchArgs(ctypes.Structure):
    """``DispatchArgs`` of ``dispatch.cu``."""

    _fields_ = (
        ("comm", CommunicatorArgs),
        ("slots", c_void_p),
        ("counts", c_void_p),
        ("ends", c_void_p),
        ("rows", c_void_p),
        ("own_rows", c_void_p),
        ("scales", c_void_p),
        ("wire_bytes", c_int32),
        ("row_bytes", c_int32),
        ("row_scales", c_int32),
        ("own_row_bytes", c_int32),
        ("quantize", c_int32),
        ("element", c_int32),
        ("slot_tokens", c_int32),
        ("width", c_int32),
        ("range", ExpertRange),
        ("num_rows", c_int32),
        ("warps", c_int32),
        ("stages", c_int32),
        ("stage_bytes", c_int32),
        ("behind_push", c_int32),
        ("early", c_int32),
        ("nodes", NodeChunks),
    )


class CombineArgs(ctypes.Structure):
    """``CombineArgs`` of ``combine.cu``."""

    _fields_ = (
        ("comm", CommunicatorArgs),
        ("slots", c_void_p),
        ("owners", c_void_p),
        ("rows", c_void_p),
        ("out", c_void_p),
        ("topk_idx", c_void_p),
        ("ends", c_void_p),
        ("row_bytes", c_int32),
        ("element", c_int32),
        ("tokens", c_int32),
        ("slot_tokens", c_int32),
        ("width", c_int32),
        ("range", ExpertRange),
        ("nodes", NodeChunks),
        ("summed", c_void_p),
        ("epoch", c_uint32),
    )


class WeightsArgs(ctypes.Structure):
    """``WeightsArgs`` of ``weights.cu``."""

    _fields_ = (
        ("comm", CommunicatorArgs),
        ("slots", c_void_p),
        ("topk_idx", c_void_p),
        ("owners", c_void_p),
        ("by_token", c_void_p),
        ("by_row", c_void_p),
        ("tokens", c_int32),
        ("top_k", c_int32),
        ("experts_per_rank", c_int32),
        ("direction", c_int32),
        ("slot_tokens", c_int32),
        ("reserved", c_int32),
    )


ENTRY_POINTS: dict[str, type[ctypes.Structure]] = {
    "layout": LayoutArgs,
    "push": PushArgs,
    "dispatch": DispatchArgs,
    "combine": CombineArgs,
    "weights": WeightsArgs,
}


def load_entry_points() -> ctypes.CDLL:
    """The library with the signatures of its entry points declared.

    Raises:
        NativeLibraryError: if there is no library, or it is of another version.
    """
    library = native.load_entry_points(ENTRY_POINTS)
    library.ep_moe_buffer_layout.restype = None
    library.ep_moe_buffer_layout.argtypes = (ctypes.POINTER(BufferShape), ctypes.POINTER(BufferLayout))
    return library


__all__ = [
    "BFLOAT16",
    "CHUNK_TOKENS",
    "COMBINE_GROUP",
    "DISPATCHES",
    "ENTRY_POINTS",
    "FAULT_EXPERT_RANGE",
    "FAULT_OVERFLOW",
    "FAULT_TIMEOUT",
    "FAULT_TOKENS",
    "FLOAT16",
    "FLOAT32",
    "FROM_SLOTS",
    "MAX_EXPERTS",
    "MAX_NODES",
    "MAX_RANKS",
    "MAX_TOP_K",
    "REPORTED",
    "STEPS",
    "SUMS",
    "TO_SLOTS",
    "WORKSPACE_WORDS",
    "BufferLayout",
    "BufferShape",
    "CombineArgs",
    "CommunicatorArgs",
    "DispatchArgs",
    "ExpertRange",
    "FaultReport",
    "LayoutArgs",
    "NodeChunks",
    "PushArgs",
    "WeightsArgs",
    "load_entry_points",
]
