"""The sum over nodes: the kernel gives what PyTorch gives."""

from __future__ import annotations

import pytest
import torch

from ep_moe.comm.layout import sum_by_token
from ep_moe.comm.node_sum import sum_over_nodes


def test_no_rows_at_all() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    places = torch.full((2, 3), -1, dtype=torch.int32)
    assert sum_over_nodes([torch.zeros(0, 8), torch.zeros(0, 8)], nothing, places).tolist() == [[0.0] * 8] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "hidden", "nodes"), [(1, 8, 1), (700, 1040, 2), (333, 128, 7), (5, 4096, 32)])
def test_kernel_equals_pytorch(dtype: torch.dtype, tokens: int, hidden: int, nodes: int) -> None:
    generator = torch.Generator("cuda").manual_seed(tokens)
    sent = torch.rand(nodes, tokens, device="cuda", generator=generator) < 0.6
    sent[:, tokens // 2] = False  # a token that went nowhere
    counts = sent.sum(1).tolist()
    of = torch.cat([of_node.nonzero().flatten() for of_node in sent])
    returned = [torch.randn(count, hidden, device="cuda", generator=generator).to(dtype) for count in counts]
    places = torch.where(sent, sent.cumsum(1) - 1, -1).to(torch.int32)
    got = sum_over_nodes(returned, of, places)
    assert torch.equal(got, sum_by_token(returned, of, tokens, torch.float32).to(dtype))
    assert not got[tokens // 2].any()
