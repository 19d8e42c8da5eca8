"""The tokens and random routing that the exchanges of benchmarks move, and how much of it must move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from machine import Machine


@dataclass(frozen=True)
class Problem:
    """One rank's inputs: bf16 ``[tokens, hidden]``, int64 and fp32 ``[tokens, top_k]``, and its traffic."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    experts: int
    remote_rows: int  # that arrive from other ranks
    rows: int  # that arrive, each once
    slots: int  # expert-major rows

    @property
    def tokens(self) -> int:
        """Of each rank."""
        return self.x.shape[0]

    @property
    def hidden(self) -> int:
        """Channels of a token."""
        return self.x.shape[1]


def row_bytes(hidden: int, fp8: bool) -> int:
    """Bytes of a row on its way: bf16, or e4m3 with an fp32 scale per 128 channels."""
    return hidden + hidden // 32 if fp8 else 2 * hidden


def make_problem(machine: Machine, *, tokens: int, hidden: int, top_k: int, experts: int) -> Problem:
    """Normal tokens, and distinct random experts with uniform weights; other ones on each rank."""
    rank, device = dist.get_rank(), machine.device
    generator = torch.Generator(device).manual_seed(1 + rank)
    x = torch.randn(tokens, hidden, device=device, generator=generator).bfloat16()
    scores = torch.rand(tokens, experts, device=device, generator=generator)
    weights, topk_idx = scores.topk(top_k, dim=1)
    ranks = topk_idx // (experts // machine.ranks)
    owners = torch.nn.functional.one_hot(ranks, machine.ranks).amax(1)  # [tokens, ranks]
    sent = torch.stack([owners.sum(0), torch.bincount(ranks.flatten(), minlength=machine.ranks)])  # rows, slots
    total = sent.clone()
    dist.all_reduce(total)
    rows, slots = (int(n) for n in total[:, rank])
    return Problem(x, topk_idx, weights, experts, rows - int(sent[0, rank]), rows, slots)
