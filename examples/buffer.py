"""A Mixture-of-Experts layer around ``ep_moe.Buffer``: trained in normal mode, then run in low-latency mode.

    torchrun --nproc-per-node=2 examples/buffer.py

On GPUs if there is one for each process, otherwise on CPUs. The layer learns to imitate a fixed linear map.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ep_moe import Buffer

HIDDEN, EXPERTS, TOP_K, TOKENS = 256, 8, 2, 64

_buffer: Buffer | None = None


class Experts(nn.Module):
    """The linear experts of this rank."""

    def __init__(self, local_experts: int, device: torch.device) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(local_experts, HIDDEN, HIDDEN, device=device) / HIDDEN**0.5)

    def forward(self, rows: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """The weighted sum of each row's local experts: ``[rows, hidden]``."""
        out = torch.zeros_like(rows)
        for expert, weight in enumerate(self.weights):
            chosen, place = (topk_idx == expert).nonzero(as_tuple=True)
            y = rows[chosen] @ weight.to(rows.dtype) * topk_weights[chosen, place, None].to(rows.dtype)
            out = out.index_add(0, chosen, y)
        return out

    def packed(self, rows: Tensor) -> Tensor:
        """Each expert's own rows: ``[local_experts, rows, hidden]``."""
        return torch.bmm(rows, self.weights.to(rows.dtype))


def moe(x: Tensor, router: nn.Linear, experts: Experts, group: dist.ProcessGroup) -> Tensor:
    """The layer, for training and prefill: ``[tokens, hidden]``."""
    global _buffer
    if _buffer is None:
        hidden_bytes = x.shape[1] * x.element_size()
        _buffer = Buffer(group, hidden_bytes, hidden_bytes)
    topk_weights, topk_idx = router(x).softmax(dim=-1).topk(TOP_K)
    recv_x, recv_topk_idx, recv_topk_weights, handle, _ = _buffer.dispatch(x, topk_idx, topk_weights, EXPERTS)
    y = experts(recv_x, recv_topk_idx, recv_topk_weights)
    out, _ = _buffer.combine(y, handle)
    return out


@torch.no_grad()
def moe_decode(x: Tensor, router: nn.Linear, experts: Experts, buffer: Buffer) -> Tensor:
    """The layer in fixed shapes, in bf16."""
    topk_weights, topk_idx = router(x).softmax(dim=-1).topk(TOP_K)
    recv, _, handle, _, hook = buffer.low_latency_dispatch(
        x.bfloat16(), topk_idx, TOKENS, EXPERTS, return_recv_hook=True
    )
    # Other work may run here: nothing occupies the GPU until the hook receives.
    hook()
    assert isinstance(recv, Tensor)
    out, _, hook = buffer.low_latency_combine(
        experts.packed(recv), topk_idx, topk_weights, handle, return_recv_hook=True
    )
    hook()
    return out


def main() -> None:
    """Train, then compare both modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    group = dist.group.WORLD
    assert group is not None

    torch.manual_seed(0)  # the router and the goal are the same on all ranks
    router = nn.Linear(HIDDEN, EXPERTS, device=device)
    goal = torch.randn(HIDDEN, HIDDEN, device=device) / HIDDEN**0.5
    torch.manual_seed(1 + group.rank())  # experts and tokens are not
    experts = Experts(EXPERTS // group.size(), device)
    optimizer = torch.optim.Adam([*experts.parameters(), *router.parameters()], lr=3e-3)
    for step in range(steps):
        x = torch.randn(TOKENS, HIDDEN, device=device)
        loss = (moe(x, router, experts, group) - x @ goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in router.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        if group.rank() == 0 and step % max(steps // 5, 1) == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    x = torch.randn(TOKENS, HIDDEN, device=device)
    decode_buffer = Buffer(group, 0, TOKENS * HIDDEN * EXPERTS, low_latency_mode=True)
    difference = (moe_decode(x, router, experts, decode_buffer).float() - moe(x, router, experts, group)).abs().max()
    if group.rank() == 0:
        print(f"loss {loss.item():.3f}; low-latency mode in bf16 differs by at most {difference.item():.3f}")
    dist.destroy_process_group()
    # Skips the interpreter's teardown, in which the threads of communication libraries can outlive their state.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
