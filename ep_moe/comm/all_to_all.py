"""All-to-all of rows over ``torch.distributed``, for any dtype and back end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def staging_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where tensors of ``device`` must lie for collectives of ``group``.

    gloo's all-to-all takes CPU tensors only; several processes that share one GPU need it too.
    """
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else device


def all_to_all_rows(
    rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send consecutive rows of ``rows`` (``[sent, ...]``) to each rank of ``group``, and get ``[received, ...]``.

    Args:
        rows: of any dtype; they travel as bytes.
        send_counts: rows to each rank.
        recv_counts: rows from each rank.
        group: the ranks.
    """
    if dist.get_world_size(group) == 1:
        return rows
    # A tensor without elements counts as contiguous whatever its strides, which a view as bytes does not accept.
    rows = rows.contiguous() if rows.numel() else torch.empty_like(rows, memory_format=torch.contiguous_format)
    staging = staging_device(group, rows.device)
    out = torch.empty((sum(recv_counts), *rows.shape[1:]), dtype=rows.dtype, device=staging)
    dist.all_to_all_single(
        out.view(torch.uint8), rows.to(staging).view(torch.uint8), list(recv_counts), list(send_counts), group=group
    )
    return out.to(rows.device)
