"""The handle of a dispatch in normal mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ep_moe.compat.deep_ep.normal import Received, Routes


class NormalHandle(tuple[Any, ...]):
    """``(rank_prefix_matrix, routes)``; the matrix is computed when it is asked for, which few programs do.

    Attributes:
        routes: for the calls that take the handle.
    """

    routes: Routes
    _rows_per_rank: Tensor
    _matrix: Tensor | None

    @classmethod
    def of(cls, arrived: Received) -> NormalHandle:
        """The handle of what a dispatch brought."""
        handle = cls((None, arrived.routes))
        handle.routes, handle._rows_per_rank, handle._matrix = arrived.routes, arrived.rows_per_rank, None
        return handle

    @property
    def rank_prefix_matrix(self) -> Tensor:
        """int32 ``[ranks, ranks]``; this rank's column counts rows from ranks 0 to i, others hold -1."""
        if self._matrix is None:
            rows = self._rows_per_rank
            self._matrix = torch.full((len(rows), len(rows)), -1, dtype=torch.int32, device=rows.device)
            self._matrix[:, self.routes.communicator.rank] = rows.cumsum(0)
        return self._matrix

    def __getitem__(self, place: Any) -> Any:
        """As of a tuple of the two."""
        return (self.rank_prefix_matrix, self.routes)[place]

    def __iter__(self) -> Iterator[Any]:
        """As of a tuple of the two."""
        return iter((self.rank_prefix_matrix, self.routes))
