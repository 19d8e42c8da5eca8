"""The MoE layers that benchmarks measure: what one GPU of a model's expert-parallel group holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A layer; gated, so that the first projection has twice the width ``ffn``."""

    hidden: int
    ffn: int
    local_experts: int  # of a rank
    top_k: int


SHAPES = {
    "deepseek_v3": Shape(7168, 2048, 128, 8),  # 256 experts on 2 GPUs
    "deepseek_v3_ep8": Shape(7168, 2048, 32, 8),  # what a rank of 8 sees
    "qwen3_235b": Shape(4096, 1536, 64, 8),  # 128 experts on 2 GPUs
    "qwen3_235b_ep8": Shape(4096, 1536, 16, 8),
    "mixtral_8x7b": Shape(4096, 14336, 4, 2),  # 8 experts on 2 GPUs
}
