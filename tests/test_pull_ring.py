"""How many rows a dispatch keeps on their way."""

from __future__ import annotations

import pytest

from ep_moe.comm import RowLayout
from ep_moe.comm.nvlink_pull import Ring, ring
from ep_moe.comm.nvlink_wire import SHARED_BYTES

DEEPSEEK_V3_FP8, DEEPSEEK_V3_BF16 = 7424, 14336
LAYOUTS: tuple[RowLayout, ...] = ("rows", "expert_major")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row_bytes", [128, 2048, DEEPSEEK_V3_FP8, DEEPSEEK_V3_BF16, 60_000, SHARED_BYTES // 2])
def test_rings_fit_shared_memory_with_a_row_stored_and_one_under_way(layout: RowLayout, row_bytes: int) -> None:
    for ranks in range(1, 9):
        for sms in range(1, 133):
            chosen = ring(layout, ranks, sms, row_bytes)
            assert chosen.warps >= 1 and chosen.stages >= 2
            assert chosen.warps * chosen.stages * row_bytes <= SHARED_BYTES


@pytest.mark.parametrize("row_bytes", [2048, DEEPSEEK_V3_FP8, DEEPSEEK_V3_BF16])
def test_rows_under_way_from_the_peer_are_as_many_on_any_number_of_sms(row_bytes: int) -> None:
    wanted = max(128, 950_000 / row_bytes)
    for sms in (16, 24, 32, 64, 96, 128):
        chosen = ring("rows", 2, sms, row_bytes)
        from_peer = sms * chosen.warps * (chosen.stages - 1) / 2
        memory_is_short = (chosen.warps + 2) * chosen.stages * row_bytes > SHARED_BYTES
        assert chosen.warps % 2 == 0
        assert from_peer <= 1.5 * wanted
        assert from_peer >= wanted / 1.5 or memory_is_short or chosen.warps == 8


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("row_bytes", [512, 2048, DEEPSEEK_V3_FP8, DEEPSEEK_V3_BF16])
def test_warps_that_also_store_have_the_link_busy(ranks: int, row_bytes: int) -> None:
    for sms in (16, 48, 64, 128):
        chosen = ring("expert_major", ranks, sms, row_bytes)
        from_peers = sms * chosen.warps * (chosen.stages - 1) * row_bytes * (1 - 1 / ranks)
        assert from_peers >= 950_000 or (chosen.warps + 1) * 3 * row_bytes > SHARED_BYTES or chosen == Ring(8, 3)
