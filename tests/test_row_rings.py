"""How rows lie where kernels of a dispatch read them: in rings of shared memory, and before that."""

from __future__ import annotations

import pytest
import torch

from ep_moe.comm.nvlink_dispatch import dispatch_ring
from ep_moe.comm.nvlink_rows import push_ring
from ep_moe.comm.nvlink_wire import SHARED_BYTES, aligned

DEEPSEEK_V3_FP8, DEEPSEEK_V3_BF16 = 7424, 14336


@pytest.mark.parametrize("row_bytes", [128, 2048, DEEPSEEK_V3_FP8, DEEPSEEK_V3_BF16, 60_000, SHARED_BYTES // 2])
def test_rings_of_dispatch_have_a_row_stored_and_one_loaded(row_bytes: int) -> None:
    for sms in range(1, 133):
        ring = dispatch_ring(sms, row_bytes)
        assert ring.warps >= 1 and ring.stages >= 2
        assert ring.warps * ring.stages * row_bytes <= SHARED_BYTES


@pytest.mark.parametrize("stage_bytes", [128, 7424, 14336, 14592, 28928, 120_064, SHARED_BYTES])
def test_rings_of_the_push_hold_a_row(stage_bytes: int) -> None:
    ring = push_ring(stage_bytes)
    assert ring.warps >= 1 and ring.stages >= 1
    assert ring.warps * ring.stages * stage_bytes <= SHARED_BYTES
    assert ring.stages == 2 or 2 * stage_bytes > SHARED_BYTES  # the next row is loaded where there is room


def test_rows_that_bulk_copies_cannot_read_are_copied() -> None:
    memory = torch.arange(4 * 16 + 1, dtype=torch.bfloat16)
    in_order, shifted, across = memory[:64].view(4, 16), memory[1:].view(4, 16), memory[:64].view(16, 4).t()
    assert aligned(in_order).data_ptr() == in_order.data_ptr()
    for rows in (shifted, across):
        copy = aligned(rows)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, rows)
