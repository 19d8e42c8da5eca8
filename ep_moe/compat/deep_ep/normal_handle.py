"""The handle of a dispatch in normal mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ep_moe.comm import Communicator
from ep_moe.compat.deep_ep.events import UsedByStreams


class NormalHandle(UsedByStreams, tuple[Any, ...]):
    """``(rank_prefix_matrix, routes)``; the matrix is computed when it is asked for, which few programs do.

    Until then ``None`` stands for it in the tuple below.

    Attributes:
        communicator: that has the routes.
        routes: its name for them.
        num_rows: rows of tensors here.
        sent: ``[tokens, top_k]`` that this rank dispatched.
        rows_per_rank: int64 ``[ranks]``, rows from each rank.
    """

    communicator: Communicator
    routes: Any
    num_rows: int
    sent: torch.Size
    rows_per_rank: Tensor
    _matrix: Tensor | None = None

    def tensors(self) -> Any:
        """The routes and what the matrix is made of."""
        return self.routes, self.rows_per_rank

    @property
    def rank_prefix_matrix(self) -> Tensor:
        """int32 ``[ranks, ranks]``; this rank's column counts rows from ranks 0 to i, others hold -1."""
        if self._matrix is None:
            rows = self.rows_per_rank
            self._matrix = torch.full((len(rows), len(rows)), -1, dtype=torch.int32, device=rows.device)
            self._matrix[:, self.communicator.rank] = rows.cumsum(0)
        return self._matrix

    def __getitem__(self, place: Any) -> Any:
        """As of a tuple of the two."""
        return (self.rank_prefix_matrix, self.routes)[place]

    def __iter__(self) -> Iterator[Any]:
        """As of a tuple of the two."""
        return iter((self.rank_prefix_matrix, self.routes))
