"""The bigram baseline against values worked out by hand or by plain loops."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from moe_gpt.bigram import bigram_loss


def as_bytes(*texts: bytes) -> tuple[np.ndarray, ...]:
    return tuple(np.frombuffer(text, dtype=np.uint8) for text in texts)


def test_bigram_equals_the_formula() -> None:
    train, validation = as_bytes(b"abracadabra", b"bandana"), as_bytes(b"cabana", b"drab")
    text = b"abracadabrabandana"
    pairs = [p for t in (b"abracadabra", b"bandana") for p in pairwise(t)]

    def loss(k: float) -> float:
        terms = []
        for held_out in (b"cabana", b"drab"):
            for a, b in pairwise(held_out):
                prior = (text.count(b) + 1) / (len(text) + 256)
                terms.append(math.log((pairs.count((a, b)) + k * prior) / (sum(p[0] == a for p in pairs) + k)))
        return -sum(terms) / len(terms)

    assert bigram_loss(train, validation) == pytest.approx(min(loss(k) for k in (0.1, 1.0, 10.0, 100.0, 1000.0)))


def test_independent_bytes_cost_their_entropy() -> None:
    text = np.random.default_rng(0).integers(0, 4, 200_000).astype(np.uint8)
    train, validation = (text[:150_000],), (text[150_000:],)
    assert bigram_loss(train, validation) == pytest.approx(math.log(4), abs=0.01)


def test_a_certain_successor_costs_nothing() -> None:
    cycle = np.arange(100_000, dtype=np.int64).astype(np.uint8)
    assert bigram_loss((cycle,), (cycle[:5000],)) < 0.01


def test_pairs_across_segments_do_not_count() -> None:
    assert math.isnan(bigram_loss(as_bytes(b"abab"), as_bytes(b"a", b"b")))
