"""The sum over nodes at a token's source: by our kernel where there is one, otherwise by PyTorch, with equal bits."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int32, c_void_p

import torch
from torch import Tensor

from ep_moe.comm.layout import sum_by_token
from ep_moe.comm.nvlink_args import MAX_NODES
from ep_moe.comm.nvlink_wire import ELEMENTS
from ep_moe.native import find_entry_points, has_code_for, launch

_VECTOR_BYTES = 16


class NodeSumArgs(ctypes.Structure):
    """``NodeSumArgs`` of ``node_sum.cu``, which says what each field means."""

    _fields_ = (
        ("rows", c_void_p * MAX_NODES),
        ("places", c_void_p),
        ("out", c_void_p),
        ("row_bytes", c_int32),
        ("element", c_int32),
        ("tokens", c_int32),
        ("nodes", c_int32),
    )


def sum_over_nodes(returned: Sequence[Tensor], tokens: Tensor, places: Tensor) -> Tensor:
    """Add the rows of each token in ascending order of nodes, in fp32 (fp64 of fp64 rows), and round once.

    Args:
        returned: from each node ``[rows, hidden]``.
        tokens: int64 ``[all rows]``, the token of each.
        places: int32 ``[nodes, tokens]``, where among a node's rows that of a token is, or -1.

    Returns:
        ``[tokens, hidden]`` in the dtype of the rows; zero for tokens without a row.
    """
    num_tokens, rows = places.shape[1], returned[0]
    row_bytes = rows.shape[1] * rows.element_size()
    if not _usable(rows, row_bytes, len(returned)):
        accumulate = torch.promote_types(rows.dtype, torch.float32)
        return sum_by_token(returned, tokens, num_tokens, accumulate).to(rows.dtype)
    library = _find_library()
    assert library is not None  # _usable() has seen to it
    returned = [part.contiguous() for part in returned]
    out = rows.new_empty(num_tokens, rows.shape[1])
    arguments = NodeSumArgs(
        rows=(c_void_p * MAX_NODES)(*(part.data_ptr() for part in returned)),
        places=places.data_ptr(),
        out=out.data_ptr(),
        row_bytes=row_bytes,
        element=ELEMENTS[rows.dtype],
        tokens=num_tokens,
        nodes=len(returned),
    )
    launch(library, "node_sum", arguments, rows.device)
    return out


def _usable(rows: Tensor, row_bytes: int, nodes: int) -> bool:
    return (
        rows.is_cuda
        and rows.dtype in ELEMENTS
        and row_bytes % _VECTOR_BYTES == 0
        and nodes <= MAX_NODES
        and has_code_for(rows.get_device())
        and _find_library() is not None
    )


@functools.cache
def _find_library() -> ctypes.CDLL | None:
    """The CUDA library with the signature of the kernel declared, or ``None`` where there is none."""
    return find_entry_points({"node_sum": NodeSumArgs}, "sums over nodes are made without their CUDA kernel")
