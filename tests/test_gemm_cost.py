"""What benchmarks take for the least work of a grouped GEMM: against tiles laid out and matrices made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemm_cost import WIDEST_TILE, gemm_work, random_counts, wasted_share, wasted_share_fitted

COUNTS = st.lists(st.integers(0, 700), min_size=1, max_size=6).filter(any)


def empty_share(counts: list[int], heights: list[int]) -> float:
    """Lay out tiles of each expert's height one by one and count their empty rows."""
    covered = empty = 0
    for count, height in zip(counts, heights, strict=True):
        left = count
        while left > 0:
            covered += height
            empty += max(height - left, 0)
            left -= height
    return empty / covered


@given(COUNTS, st.sampled_from([8, 64, 128, 256]))
def test_wasted_rows(counts: list[int], tile: int) -> None:
    assert wasted_share(counts, tile) == pytest.approx(empty_share(counts, [tile] * len(counts)))


@given(COUNTS)
def test_fitted_tiles_are_few_and_low(counts: list[int]) -> None:
    tiles = [-(-count // WIDEST_TILE) for count in counts]
    allowed = range(8, WIDEST_TILE + 8, 8)
    heights = [next(h for h in allowed if h * max(n, 1) >= c) for c, n in zip(counts, tiles, strict=True)]
    assert wasted_share_fitted(counts) == pytest.approx(empty_share(counts, heights))
    assert all(h * n - c < 8 * max(n, 1) for c, n, h in zip(counts, tiles, heights, strict=True))


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 1], [4]])
def test_work_is_that_of_the_matrices(counts: list[int]) -> None:
    inner, outer = 16, 24
    rows = torch.empty(sum(counts), inner, dtype=torch.bfloat16)
    weights = torch.empty(sum(c > 0 for c in counts), outer, inner, dtype=torch.bfloat16)
    out = torch.empty(sum(counts), outer, dtype=torch.bfloat16)
    work = gemm_work(counts, inner, outer)
    assert work.bytes == rows.nbytes + weights.nbytes + out.nbytes
    assert work.flops == sum(2 * count * inner * outer for count in counts)


def test_skewed_counts_are_more_uneven() -> None:
    even, skewed = (random_counts(32768, 128, skewed) for skewed in (False, True))
    assert sum(even) == sum(skewed) == 32768
    assert max(even) < 1.3 * 256 < 4 * 256 < max(skewed)
