"""Loss of the simplest byte models: what a network has to beat to have learned more than byte statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_BYTES = 256
# Weights of the unigram prior, in pseudo-counts per preceding byte.
_PRIOR_COUNTS = (0.1, 1.0, 10.0, 100.0, 1000.0)


def bigram_loss(train: Sequence[NDArray[np.uint8]], validation: Sequence[NDArray[np.uint8]]) -> float:
    """Cross-entropy on ``validation`` of a model that sees one preceding byte, fitted on ``train``.

    ``p(b | a) = (count(a, b) + k * p(b)) / (count(a) + k)`` with the smoothed unigram ``p(b)``: a Dirichlet prior
    (MacKay and Peto 1995, "A hierarchical Dirichlet language model"). Of a few ``k`` the best on ``validation``
    itself is taken, which flatters this baseline: a network below it is better by at least the difference.

    Args:
        train: contiguous segments, uint8 ``[bytes]`` each; pairs of bytes are counted within segments only.
        validation: likewise.

    Returns:
        Nats per byte; NaN if ``validation`` holds no pair.
    """
    counts, held_out, prior = _count_pairs(train), _count_pairs(validation), _unigram(train)
    losses = []
    for k in _PRIOR_COUNTS:
        conditional = (counts + k * prior) / (counts.sum(axis=1, keepdims=True) + k)
        losses.append(_cross_entropy(held_out, conditional))
    return min(losses)


def _unigram(segments: Iterable[NDArray[np.uint8]]) -> NDArray[np.float64]:
    counts = _count_bytes(segments) + 1
    return counts / counts.sum()


def _count_bytes(segments: Iterable[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """Occurrences of each byte, int64 ``[256]``."""
    counts = np.zeros(_BYTES, dtype=np.int64)
    for segment in segments:
        counts += np.bincount(segment, minlength=_BYTES)
    return counts


def _count_pairs(segments: Iterable[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """Occurrences of each pair (byte, next byte), int64 ``[256, 256]``."""
    counts = np.zeros(_BYTES * _BYTES, dtype=np.int64)
    for segment in segments:
        pairs = segment[:-1].astype(np.int64) * _BYTES + segment[1:]
        counts += np.bincount(pairs, minlength=_BYTES * _BYTES)
    return counts.reshape(_BYTES, _BYTES)


def _cross_entropy(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Mean of ``-log p`` over ``counts`` occurrences, in nats; both arrays of one shape, every p above 0."""
    total = int(counts.sum())
    return float(-(counts * np.log(probabilities)).sum() / total) if total else float("nan")
