"""Initial weights that do not depend on how the experts are spread over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def initialize_experts(weight: Tensor, init_method: Callable[[Tensor], Any], first_expert: int) -> None:
    """Fill the weight of every local expert from a random stream that belongs to its global index.

    One base seed is drawn from the default CPU generator, whatever the number of local experts, so ranks that
    entered in the same state leave in the same state. Each expert's values come from a generator seeded with
    the base seed and its global index; other random streams are left as they were.

    Args:
        weight: ``[local_experts, ...]``, filled in place. Nothing happens, and nothing is drawn, on meta.
        init_method: fills the tensor it is given, one expert's ``weight[i]``, from the default generators.
        first_expert: global index of ``weight[0]``.
    """
    if weight.device.type == "meta":
        return
    base = int(torch.randint(2**63 - 1, (), device="cpu"))
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        for index, expert in enumerate(weight.detach().unbind(0), start=first_expert):
            seed = _mix(base, index)
            torch.default_generator.manual_seed(seed)
            # not torch.manual_seed, which would reseed every GPU of the host and not only the forked one
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            init_method(expert)


def _mix(base: int, index: int) -> int:
    """A 63-bit seed; hashed because base + index would let neighbouring base seeds share streams."""
    digest = hashlib.blake2b(f"{base}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
