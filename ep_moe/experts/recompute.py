"""Rows that a linear layer makes again in its backward pass instead of keeping them till then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How to make rows again.

    Attributes:
        tensors: what is kept for it, without their own history.
        make: from these to the rows, bit for bit.
    """

    tensors: tuple[Tensor | None, ...]
    make: Callable[..., Tensor]


def kept(rows: Tensor) -> Recipe:
    """The recipe of rows that are kept themselves."""
    return Recipe((rows,), _itself)


def _itself(rows: Tensor) -> Tensor:
    return rows
