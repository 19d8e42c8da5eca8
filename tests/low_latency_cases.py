"""Random exchanges of the low-latency contract, and what must come of them, in plain PyTorch on the CPU."""

from __future__ import annotations

import functools
import itertools
import math
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
    out = random_rows((case.local_experts, case.ranks * case.max_tokens, case.hidden), generator)
    if case.special and tokens:
        strange = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), float("-inf"), 1e-40, -1e-38, 3e38])
        chosen = strange[torch.randint(8, x.shape, generator=generator)]
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.02, chosen, x)
        x[0] = -0.0  # words that look empty
        out[:, ::3] = -0.0
        weights[-1, 0] = float("nan")
        weights[0, -1] = torch.tensor(0x8000 - 2**31, dtype=torch.int32).view(torch.float32)  # looks empty: -4.6e-41
    return LowLatencyInputs(x.bfloat16(), idx, weights, out)


def random_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """bf16 of both signs and magnitudes from 2**-7 to 2, four from a random word: normal ones take six times longer."""
    words = torch.empty(math.prod(shape) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16) & ~0x7C00 | 0x3C00  # sign, the last three bits of the exponent, mantissa
    return bits.view(torch.bfloat16).view(shape)


@functools.lru_cache(maxsize=8)
def expected_rows(case: LowLatencyCase, rank: int) -> list[list[tuple[int, int]]]:
    """(source rank, token) of the rows of each local expert, in order."""
    experts = torch.arange(rank * case.local_experts, (rank + 1) * case.local_experts)
    named = torch.cat(
        [(make_inputs(case, source).topk_idx[:, :, None] == experts).any(1) for source in range(case.ranks)]
    )
    tokens = [(source, token) for source in range(case.ranks) for token in range(case.tokens[source])]
    return [[tokens[place] for place in of_expert.nonzero().flatten().tolist()] for of_expert in named.T]


def expected_payload(case: LowLatencyCase, rows: list[tuple[int, int]]) -> list[Tensor]:
    """Values, and scales if there are any, of rows in order."""
    before = [0, *itertools.accumulate(case.tokens)]
    every = torch.cat([make_inputs(case, source).x for source in range(case.ranks)])
    x = every[[before[source] + token for source, token in rows]]
    if case.scale_format == "none":
        return [x]
    return [*(quantize_e4m3(x) if case.scale_format == "fp32" else quantize_e4m3_ue8m0(x))]


@functools.lru_cache(maxsize=8)
def expected_sums(case: LowLatencyCase, rank: int) -> Tensor:
    """What combine gives: bf16 ``[tokens, hidden]``.

    A rank adds the rows of a token in the order of its entries, in fp32, and rounds once; the token's rank adds those
    sums in the order of the ranks, and rounds once.
    """
    mine = make_inputs(case, rank)
    total = torch.zeros(case.tokens[rank], case.hidden)
    for owner in range(case.ranks):
        out = make_inputs(case, owner).experts_out
        row_of = torch.zeros(case.local_experts, case.tokens[rank], dtype=torch.int64)
        for expert, rows in enumerate(expected_rows(case, owner)):
            here = [(token, place) for place, (source, token) in enumerate(rows) if source == rank]
            if here:
                tokens, places = torch.tensor(here).T
                row_of[expert, tokens] = places
        partial, there = torch.zeros_like(total), torch.zeros(case.tokens[rank], dtype=torch.bool)
        for expert, weight in zip(mine.topk_idx.T, mine.topk_weights.T, strict=True):
            named = (expert >= 0) & (expert // case.local_experts == owner)
            tokens = named.nonzero().flatten()
            local = expert[tokens] % case.local_experts
            partial[tokens] += weight[tokens, None] * out[local, row_of[local, tokens]].float()
            there |= named
        total[there] += partial[there].bfloat16().float()
    return total.bfloat16()


def agree(got: Tensor, want: Tensor) -> Tensor:
    """Which elements are equal, zeros of either sign being equal and NaN being NaN."""
    a, b = got.double(), want.double()  # which hold the values of all dtypes here
    return (a == b) | (a.isnan() & b.isnan())


def same(got: Tensor, want: Tensor) -> bool:
    """Whether all elements :func:`agree`."""
    return got.shape == want.shape and bool(agree(got, want).all())
