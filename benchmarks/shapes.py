"""The MoE layers that benchmarks measure: what one GPU of a model's expert-parallel group holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ep_moe.experts.backends import select_backend
from ep_moe.experts.gemm import GroupedGemm


@dataclass(frozen=True)
class Shape:
    """A layer; gated, so that the first projection has twice the width ``ffn``."""

    hidden: int
    ffn: int
    local_experts: int  # of a rank
    top_k: int


SHAPES = {
    "deepseek_v3": Shape(7168, 2048, 128, 8),  # 256 experts on 2 GPUs
    "deepseek_v3_ep4": Shape(7168, 2048, 64, 8),
    "deepseek_v3_ep8": Shape(7168, 2048, 32, 8),  # what a rank of 8 sees
    "qwen3_235b": Shape(4096, 1536, 64, 8),  # 128 experts on 2 GPUs
    "qwen3_235b_ep4": Shape(4096, 1536, 32, 8),
    "qwen3_235b_ep8": Shape(4096, 1536, 16, 8),
    "mixtral_8x7b": Shape(4096, 14336, 4, 2),  # 8 experts on 2 GPUs
    "mixtral_8x7b_ep4": Shape(4096, 14336, 2, 2),
    "mixtral_8x7b_ep8": Shape(4096, 14336, 1, 2),
}
TWO_GPU_SHAPES = ["deepseek_v3", "deepseek_v3_ep8", "qwen3_235b", "qwen3_235b_ep8", "mixtral_8x7b"]


def shapes_for(ranks: int) -> list[str]:
    """The models whole on 4 or 8 ranks; otherwise those of two, with the load of eight for the larger ones."""
    return [name for name in SHAPES if name.endswith(f"_ep{ranks}")] or TWO_GPU_SHAPES


def gemm_of(shape: Shape, backend: str, device: torch.device) -> GroupedGemm:
    """The grouped GEMMs of ``backend`` for the shape's experts in bf16.

    Raises:
        ConfigError: if the back end cannot run them.
    """
    return select_backend(
        backend,
        dtype=torch.bfloat16,
        device=device,
        num_local_experts=shape.local_experts,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
    )
