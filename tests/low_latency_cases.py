"""Random exchanges of the low-latency contract, and what must come of them, in plain PyTorch on the CPU."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm.fp8 import quantize_e4m3, quantize_e4m3_ue8m0


@dataclass(frozen=True)
class LowLatencyCase:
    """Sizes of one exchange; ``tokens`` has an entry per rank."""

    tokens: tuple[int, ...]
    max_tokens: int
    hidden: int
    local_experts: int
    top_k: int
    scale_format: str = "none"
    special: bool = False  # NaN, infinities, zeros of both signs, denormals
    seed: int = 0

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def num_experts(self) -> int:
        return self.ranks * self.local_experts


def random_case(seed: int, ranks: int) -> LowLatencyCase:
    """Any case, of a few sizes, so that communicators can be reused."""
    choose = random.Random(seed)
    max_tokens, hidden, local_experts = choose.choice([(8, 128, 2), (33, 640, 5), (1, 1024, 1), (128, 256, 16)])
    return LowLatencyCase(
        tokens=tuple(choose.choice([0, max_tokens, choose.randint(0, max_tokens)]) for _ in range(ranks)),
        max_tokens=max_tokens,
        hidden=hidden,
        local_experts=local_experts,
        top_k=choose.choice([1, 2, 8, choose.randint(1, 32)]),
        scale_format=choose.choice(["none", "fp32", "ue8m0"]),
        special=choose.random() < 0.4,
        seed=seed,
    )


@dataclass(frozen=True)
class LowLatencyInputs:
    """Of one rank: bf16 ``x``, ``topk_idx``, fp32 ``topk_weights``, and bf16 ``experts_out`` for all its rows."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    experts_out: Tensor


@functools.lru_cache(maxsize=8)
def make_inputs(case: LowLatencyCase, rank: int) -> LowLatencyInputs:
    """The same on every process. Entries may be -1 or repeat an expert."""
    generator = torch.Generator().manual_seed(case.seed * 100 + rank)
    tokens, top_k = case.tokens[rank], case.top_k
    x = torch.randn(tokens, case.hidden, generator=generator)
    idx = torch.randint(-1, case.num_experts, (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    places = case.ranks * case.max_tokens
    out = torch.randn(case.local_experts, places, case.hidden, generator=generator)
    if case.special and tokens:
        strange = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), float("-inf"), 1e-40, -1e-38, 3e38])
        chosen = strange[torch.randint(8, x.shape, generator=generator)]
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.02, chosen, x)
        x[0] = -0.0  # words that look empty
        out[:, ::3] = -0.0
        weights[-1, 0] = float("nan")
    return LowLatencyInputs(x.bfloat16(), idx, weights, out.bfloat16())


@functools.lru_cache(maxsize=8)
def expected_rows(case: LowLatencyCase, rank: int) -> list[list[tuple[int, int]]]:
    """(source rank, token) of the rows of each local expert, in order."""
    routing = [make_inputs(case, source).topk_idx for source in range(case.ranks)]
    return [
        [
            (source, token)
            for source in range(case.ranks)
            for token in (routing[source] == expert).any(1).nonzero().flatten().tolist()
        ]
        for expert in range(rank * case.local_experts, (rank + 1) * case.local_experts)
    ]


def expected_payload(case: LowLatencyCase, rows: list[tuple[int, int]]) -> list[Tensor]:
    """Values, and scales if there are any, of the rows of one expert."""
    x = torch.stack([make_inputs(case, source).x[token] for source, token in rows])
    if case.scale_format == "none":
        return [x]
    return [*(quantize_e4m3(x) if case.scale_format == "fp32" else quantize_e4m3_ue8m0(x))]


def expected_sums(case: LowLatencyCase, rank: int) -> Tensor:
    """What combine gives: bf16 ``[tokens, hidden]``."""
    mine = make_inputs(case, rank)
    total = torch.zeros(case.tokens[rank], case.hidden)
    for owner in range(case.ranks):
        out = make_inputs(case, owner).experts_out
        order = [{row: place for place, row in enumerate(rows)} for rows in expected_rows(case, owner)]
        for token in range(case.tokens[rank]):
            partial, there = torch.zeros(case.hidden), False
            for k, expert in enumerate(mine.topk_idx[token].tolist()):
                local = expert - owner * case.local_experts
                if expert >= 0 and 0 <= local < case.local_experts:
                    there = True
                    row = out[local, order[local][rank, token]].float()
                    partial = partial + mine.topk_weights[token, k] * row
            if there:
                total[token] += partial.bfloat16().float()
    return total.bfloat16()


def same(got: Tensor, want: Tensor) -> bool:
    """Equal, zeros of either sign being equal and NaN being NaN."""
    if got.dtype == torch.int32:
        return torch.equal(got, want)
    a, b = got.float(), want.float()
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
