"""Normal-mode dispatch and combine, stage by stage: ours beside ``torch.distributed`` collectives.

    torchrun --nproc-per-node=2 benchmarks/normal.py --tokens 4096 --hidden 7168 --top-k 8 --experts 256

One process a GPU. Times are medians over the ranks' slowest, from CUDA events after a collective barrier, caches
flushed before every call; stages are kernel times of rank 0 from PyTorch's profiler. Bytes are remote bytes a rank
receives; with one process there are none, and the figures are those of the local work.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm import Communicator, NvlinkCommunicator, PortableCommunicator

REPEATS, WARM_UP = 20, 5
FLUSH_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Timing:
    """Microseconds: of the slowest rank of each call, over the calls."""

    median: float
    least: float
    most: float


def main() -> None:
    """Measure one shape."""
    arguments = parse_arguments()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    shared = int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count()
    dist.init_process_group("gloo" if shared else "nccl", device_id=None if shared else device)
    world = dist.group.WORLD
    assert world is not None
    x, topk_idx, topk_weights = inputs(arguments, device)
    remote_rows = count_remote_rows(topk_idx, arguments.experts)
    if dist.get_rank() == 0:
        print(f"{torch.cuda.get_device_name(device)} x {world.size()}, PyTorch {torch.__version__}, {vars(arguments)}")
        print(f"rank 0 sends {remote_rows} rows to other ranks")
        print(f"{'what':<44} {'median':>8} {'min':>8} {'max':>8} us")
    for fp8 in (False, True):
        for sms in arguments.sms:
            measure(
                f"nvlink {'fp8' if fp8 else 'bf16'}, {sms} SMs",
                NvlinkCommunicator(world, device),
                x,
                topk_idx,
                topk_weights,
                arguments.experts,
                fp8,
                sms,
            )
        measure(
            f"portable {'fp8' if fp8 else 'bf16'}",
            PortableCommunicator(world),
            x,
            topk_idx,
            topk_weights,
            arguments.experts,
            fp8,
            None,
        )
    dist.destroy_process_group()


def measure(
    name: str,
    communicator: Communicator,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    experts: int,
    fp8: bool,
    sms: int | None,
) -> None:
    """Print the lines of one communicator: from ``topk_idx`` to expert-major rows, and back to the final sum."""

    def dispatch() -> object:
        return communicator.dispatch(x, topk_idx, topk_weights, num_experts=experts, fp8=fp8, num_sms=sms)

    arrived = communicator.dispatch(x, topk_idx, topk_weights, num_experts=experts, fp8=fp8, num_sms=sms)
    rows = torch.randn(arrived.segments.num_rows, x.shape[1], device=x.device).to(x.dtype)
    report(f"{name}: dispatch", time_call(dispatch, x.device))
    report(f"{name}: combine", time_call(lambda: communicator.combine(rows, arrived.handle), x.device))
    for kernel, microseconds in kernel_times(lambda: (dispatch(), communicator.combine(rows, arrived.handle))).items():
        if dist.get_rank() == 0 and "ep_moe" in kernel:
            print(f"    {kernel.split('::')[-1].split('(')[0]:<40} {microseconds:8.1f}")


def time_call(call: Callable[[], object], device: torch.device) -> Timing:
    """Time ``call`` on all ranks."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    times = []
    for repeat in range(WARM_UP + REPEATS):
        flush.fill_(repeat)
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        slowest = torch.tensor(start.elapsed_time(end) * 1000.0, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if repeat >= WARM_UP:
            times.append(float(slowest))
    return Timing(statistics.median(times), min(times), max(times))


def kernel_times(call: Callable[[], object]) -> dict[str, float]:
    """Mean microseconds of each kernel in ``call``."""
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    return {event.key: event.device_time for event in profile.key_averages()}


def report(name: str, timing: Timing) -> None:
    """One line, on rank 0."""
    if dist.get_rank() == 0:
        print(f"{name:<44} {timing.median:8.1f} {timing.least:8.1f} {timing.most:8.1f}", flush=True)


def inputs(arguments: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 tokens, random distinct experts and weights of this rank."""
    generator = torch.Generator(device).manual_seed(1 + dist.get_rank())
    x = torch.randn(arguments.tokens, arguments.hidden, device=device, generator=generator).bfloat16()
    scores = torch.rand(arguments.tokens, arguments.experts, device=device, generator=generator)
    weights, topk_idx = scores.topk(arguments.top_k, dim=1)
    return x, topk_idx, weights


def count_remote_rows(topk_idx: Tensor, experts: int) -> int:
    """(token, rank) pairs that leave this rank."""
    size = dist.get_world_size()
    owners = torch.nn.functional.one_hot(topk_idx // (experts // size), size).amax(1)
    owners[:, dist.get_rank()] = 0
    return int(owners.sum())


def parse_arguments() -> argparse.Namespace:
    """The shape, and the SM budgets to try."""
    parser = argparse.ArgumentParser(description="Normal-mode dispatch and combine.")
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--sms", type=int, nargs="+", default=[8, 16, 24, 32, 64, 128])
    return parser.parse_args()


if __name__ == "__main__":
    main()
