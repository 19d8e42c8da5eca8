"""A few low-latency exchanges on small shapes, for compute-sanitizer; ``tests/run_sanitizer.sh`` runs it under it.

Ranks share a GPU. Every result is compared with what plain PyTorch makes of the inputs, so that a run under a tool that
slows kernels down, and orders them otherwise, also shows whether the protocol holds.
"""

from __future__ import annotations

import itertools
import sys

import torch
import torch.distributed as dist
from communicators import make_reach, rank_device
from low_latency_cases import LowLatencyCase, expected_payload, expected_rows, expected_sums, make_inputs, same
from ranks import run_ranks

from ep_moe.comm.nvlink_low_latency import NvlinkLowLatencyCommunicator

ROUNDS = 3  # a landing buffer is written again
TIMEOUT_S = 120.0


def check(rank: int, world: int, kind: str, scale_format: str, split: bool) -> int:
    """The number of wrong tensors of this rank in several rounds, sending and receiving apart if ``split``.

    Weights travel with the rows then, and else with the sums.
    """
    device, wrong = rank_device("cuda", rank), 0
    sizes = {"max_tokens": 5, "hidden": 256}
    communicator = NvlinkLowLatencyCommunicator(
        dist.group.WORLD,
        device,
        num_experts=3 * world,
        timeout_s=TIMEOUT_S,
        reach=make_reach(kind, dist.group.WORLD, device),
        **sizes,
    )
    for seed in range(ROUNDS):
        tokens = tuple((seed + other) % 6 for other in range(world))
        case = LowLatencyCase(tokens, **sizes, local_experts=3, top_k=3, scale_format=scale_format, seed=seed)
        mine = make_inputs(case, rank)
        x, idx, weights, experts_out = (
            t.to(device) for t in (mine.x, mine.topk_idx, mine.topk_weights, mine.experts_out)
        )
        if split:
            packed, receive = communicator.dispatch_send(x, idx, weights, scale_format=scale_format)
            receive()
            out, receive = communicator.combine_send(experts_out, idx, None, packed.handle)
            receive()
        else:
            packed = communicator.dispatch(x, idx, scale_format=scale_format)
            out = communicator.combine(experts_out, idx, weights, packed.handle)
        torch.cuda.synchronize()
        for expert, rows in enumerate(expected_rows(case, rank)):
            got = [t[expert, : len(rows)].cpu() for t in (packed.rows, packed.scales) if t is not None]
            wrong += int(packed.counts[expert]) != len(rows)
            if rows:
                wrong += sum(not same(a, b) for a, b in zip(got, expected_payload(case, rows), strict=True))
        wrong += not same(out.cpu(), expected_sums(case, rank))
    communicator.check()
    return wrong


def main() -> None:
    """On one node, and where each rank poses as one; every scale format, in one call and in two."""
    ranks = int(sys.argv[1])
    for kind, scale_format, split in itertools.product(
        ("nvlink", "loopback_1"), ("none", "fp32", "ue8m0"), (False, True)
    ):
        wrong = run_ranks(ranks, check, kind, scale_format, split)
        print(f"{ranks} ranks, {kind}, scales {scale_format}, split {split}: wrong tensors {wrong}", flush=True)
        if any(wrong):
            sys.exit(1)


if __name__ == "__main__":
    main()
