"""A few normal-mode exchanges on small shapes, for compute-sanitizer; ``tests/run_sanitizer.sh`` runs it under it.

Ranks share a GPU. Every result is compared with that of the portable communicator, bit by bit.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from communicators import rank_device
from ranks import run_ranks
from routing_cases import Case, make_inputs

from ep_moe.comm import PortableCommunicator, RowLayout
from ep_moe.comm.nvlink import NvlinkCommunicator

ROUNDS = 3  # every part of the buffer is written again
TIMEOUT_S = 120.0


def check(rank: int, world: int, dtype: torch.dtype, fp8: bool) -> int:
    """The number of wrong tensors of this rank in several rounds, in both layouts."""
    device, wrong = rank_device("cuda", rank), 0
    ours = NvlinkCommunicator(dist.group.WORLD, device, max_tokens=40, timeout_s=TIMEOUT_S)
    oracle = PortableCommunicator(dist.group.WORLD)
    layouts: tuple[RowLayout, ...] = ("expert_major", "rows")
    for seed in range(ROUNDS):
        tokens = tuple((17 * (seed + other)) % 41 for other in range(world))
        case = Case(tokens, num_experts=3 * world, top_k=3, hidden=256, pattern="some_unrouted", dtype=dtype, seed=seed)
        x, idx, weights = (t.to(device) for t in make_inputs(case, rank))
        for layout in layouts:
            got, want = (
                c.dispatch(
                    x, idx, weights, num_experts=case.num_experts, alignment=8, fp8=fp8, layout=layout, num_sms=8
                )
                for c in (ours, oracle)
            )
            rows = torch.randn(want.rows.shape, device=device).to(dtype)
            pairs = [
                (got.rows.view(torch.uint8), want.rows.view(torch.uint8)),
                (got.weights, want.weights),
                (ours.dispatch_cached(x, got.handle, layout), oracle.dispatch_cached(x, want.handle, layout)),
                (ours.combine(rows, got.handle, layout), oracle.combine(rows, want.handle, layout)),
                (
                    ours.combine_weights(want.weights.float(), got.handle),
                    oracle.combine_weights(want.weights.float(), want.handle),
                ),
            ]
            if layout == "expert_major":
                summed, steps = ours.combine_in_groups(rows, got.handle, 2)
                again, later = ours.dispatch_cached_in_groups(x, got.handle, 2)
                list(steps), list(later)
                pairs += [
                    (again, oracle.dispatch_cached(x, want.handle)),
                    (summed, oracle.combine(rows, want.handle)),
                ]
            wrong += sum(not torch.equal(a, b) for a, b in pairs)
    torch.cuda.synchronize()
    ours.check()
    return wrong


def main() -> None:
    """Rows as they are and quantised."""
    ranks = int(sys.argv[1])
    for dtype, fp8 in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        wrong = run_ranks(ranks, check, dtype, fp8)
        print(f"{ranks} ranks, {dtype}, fp8 {fp8}: wrong tensors {wrong}", flush=True)
        if any(wrong):
            sys.exit(1)


if __name__ == "__main__":
    main()
