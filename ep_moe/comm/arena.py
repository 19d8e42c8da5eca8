"""Several tensors in one allocation: to the host, a tensor and its end cost as much as the launch that fills it."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 128  # a line of the caches


class Arena:
    """Memory for what one launch writes; lives as long as anything that holds :attr:`memory` or a tensor of it.

    Tensors of one arena count as one for autograd's record of changes in place, so it is not for what a user may both
    change and differentiate.

    Attributes:
        memory: int32, all of it.
        addresses: where each part begins, by its name.
    """

    def __init__(self, device: torch.device, **parts: int) -> None:
        """Allocate, uninitialised.

        Args:
            device: of the memory.
            **parts: bytes of each part by its name; may be 0.
        """
        self._offsets, end = {}, 0
        for name, size in parts.items():
            self._offsets[name] = end
            end += size + -size % _ALIGNMENT
        self.memory = torch.empty(end // 4, dtype=torch.int32, device=device)
        base = self.memory.data_ptr()
        self.addresses = {name: base + offset for name, offset in self._offsets.items()}

    def tensor(self, part: str, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """The beginning of a part as a contiguous tensor of one or two dimensions."""
        memory = self.memory if dtype == torch.int32 else self.memory.view(dtype)
        return memory.as_strided(shape, (*shape[1:], 1), self._offsets[part] // dtype.itemsize)
