"""The arguments of the low-latency entry points: the structs of ``csrc/``, whose sources say what each field means."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_uint64, c_void_p

from ep_moe import native
from ep_moe.comm.nvlink_args import MAX_RANKS

MAX_BLOCKS = 512
MAX_NODE_RANKS = 32
WORKSPACE_WORDS = 4 + 2 * MAX_BLOCKS
MASKED, REPORTED, ROUNDS = 1, 2, 4  # words of the workspace
SEND, RECEIVE = 1, 2
EMPTY_WORD, EMPTY_WEIGHT = 0x80008000 - 2**32, -1  # as int32


class LowLatencyShape(ctypes.Structure):
    """``LowLatencyShape`` of ``low_latency.cuh``."""

    _fields_ = (
        ("ranks", c_int32),
        ("max_tokens", c_int32),
        ("max_top_k", c_int32),
        ("num_experts", c_int32),
        ("hidden", c_int32),
        ("experts_per_rank", c_int32),
        ("row_bytes", c_int64),
    )


class LowLatencyLayout(ctypes.Structure):
    """``LowLatencyLayout`` of ``low_latency.cuh``."""

    _fields_ = tuple((name, c_int64) for name in ("routing", "entered", "rows", "sums", "weights", "total"))


class LowLatencyStaging(ctypes.Structure):
    """``LowLatencyStaging`` of ``low_latency_reach.cuh``."""

    _fields_ = tuple((name, c_int64) for name in ("routing", "rows", "sums", "weights", "total"))


class LowLatencyNodes(ctypes.Structure):
    """``LowLatencyNodes`` of ``low_latency_reach.cuh``."""

    _fields_ = (
        ("buffers", c_void_p * MAX_NODE_RANKS),
        ("staging", LowLatencyStaging),
        ("near", c_uint32),
        ("reserved", c_uint32),
    )


class LowLatency(ctypes.Structure):
    """``LowLatency`` of ``low_latency.cuh``."""

    _fields_ = (
        ("buffers", c_void_p * MAX_RANKS),
        ("nodes", c_void_p),
        ("layout", LowLatencyLayout),
        ("shape", LowLatencyShape),
        ("workspace", c_void_p),
        ("report", c_void_p),
        ("timeout_ns", c_uint64),
        ("rank", c_int32),
        ("phases", c_uint32),
        ("blocks", c_int32),
        ("threads", c_int32),
        ("own", c_int32),
        ("rank_factor", c_uint32),
    )


class LowLatencyDispatchArgs(ctypes.Structure):
    """``LowLatencyDispatchArgs`` of ``low_latency_routing.cuh``."""

    _fields_ = (
        ("ll", LowLatency),
        ("x", c_void_p),
        ("topk_idx", c_void_p),
        ("topk_weights", c_void_p),
        ("rows", c_void_p),
        ("scales", c_void_p),
        ("counts", c_void_p),
        ("ranges", c_void_p),
        ("source_token", c_void_p),
        ("slots", c_void_p),
        ("weights", c_void_p),
        ("round", c_void_p),
        ("received", c_void_p),
        ("wait_ns", c_void_p),
        ("tokens", c_int32),
        ("top_k", c_int32),
        ("scale_format", c_int32),
        ("table_bytes", c_int32),
    )


class LowLatencyCombineArgs(ctypes.Structure):
    """``LowLatencyCombineArgs`` of ``low_latency_combine.cuh``."""

    _fields_ = (
        ("ll", LowLatency),
        ("rows", c_void_p),
        ("slots", c_void_p),
        ("weights", c_void_p),
        ("topk_idx", c_void_p),
        ("topk_weights", c_void_p),
        ("out", c_void_p),
        ("round", c_void_p),
        ("wait_ns", c_void_p),
        ("tokens", c_int32),
        ("top_k", c_int32),
    )


# Of kernels between nodes, which both libraries hold.
NODES_ENTRY_POINTS: dict[str, type[ctypes.Structure]] = {
    "low_latency_nodes_dispatch": LowLatencyDispatchArgs,
    "low_latency_nodes_combine": LowLatencyCombineArgs,
}


def load_entry_points() -> ctypes.CDLL:
    """The library with the signatures of the low-latency entry points declared.

    Raises:
        NativeLibraryError: if there is no library, or it is of another version.
    """
    library = native.load_entry_points(
        {
            "low_latency_dispatch": LowLatencyDispatchArgs,
            "low_latency_combine": LowLatencyCombineArgs,
            **NODES_ENTRY_POINTS,
        }
    )
    library.ep_moe_low_latency_layout.restype = None
    library.ep_moe_low_latency_layout.argtypes = (ctypes.POINTER(LowLatencyShape), ctypes.POINTER(LowLatencyLayout))
    library.ep_moe_low_latency_staging.restype = None
    library.ep_moe_low_latency_staging.argtypes = (ctypes.POINTER(LowLatencyShape), ctypes.POINTER(LowLatencyStaging))
    return library
