"""What a grouped GEMM of given row counts must do at least: bytes, operations, and tile rows that hold no token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

WIDEST_TILE, TILE_STEP = 176, 8  # of tiles with tokens on the N side of wgmma


@dataclass(frozen=True)
class GemmWork:
    """Of forward, dgrad and wgrad alike: the same three matrices, one of them written."""

    flops: int
    bytes: int


def gemm_work(counts: Sequence[int], in_features: int, out_features: int, element_bytes: int = 2) -> GemmWork:
    """Work of one projection over experts with ``counts`` rows; every matrix moves once.

    Experts without rows cost nothing; only wgrad must write their zeros, which is left out.
    """
    rows, experts = sum(counts), sum(count > 0 for count in counts)
    elements = rows * (in_features + out_features) + experts * in_features * out_features
    return GemmWork(2 * rows * in_features * out_features, elements * element_bytes)


def random_counts(rows: int, experts: int, skewed: bool, seed: int = 1) -> list[int]:
    """Rows of each expert when ``rows`` choose at random; skewed: with log-normal popularity (sigma 1)."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.randn(experts, generator=generator).exp() if skewed else torch.ones(experts)
    chosen = torch.multinomial(popularity, rows, replacement=True, generator=generator)
    return [int(n) for n in torch.bincount(chosen, minlength=experts)]


def wasted_share(counts: Sequence[int], tile: int) -> float:
    """Share of the rows of all tiles that hold no token, with tiles of ``tile`` rows."""
    return 1 - sum(counts) / sum(-(-count // tile) * tile for count in counts)


def wasted_share_fitted(counts: Sequence[int]) -> float:
    """As :func:`wasted_share`, each expert in as few tiles of up to 176 rows as it needs, all as low as can be."""
    covered = 0
    for count in counts:
        tiles = -(-count // WIDEST_TILE)
        if tiles:
            covered += tiles * (-(-count // (tiles * TILE_STEP)) * TILE_STEP)
    return 1 - sum(counts) / covered
