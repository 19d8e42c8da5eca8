"""What every benchmark starts with: one process a GPU, their group, and the rates this machine reaches.

``python benchmarks/NAME.py --ranks 8`` starts the processes itself; under ``torchrun`` it is one of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

COPY_BYTES, COPIES = 512 * 1024**2, 5
SHARED_WARNING = "several ranks share a GPU, where their kernels take turns: TIMES MEAN NOTHING, only that it runs"


@dataclass(frozen=True)
class Machine:
    """Where the benchmark runs.

    Attributes:
        device: of this rank.
        ranks: of the group.
        shared: several ranks share a GPU. They cannot use NCCL, and times mean nothing.
        group: all ranks; over gloo if ``shared``, else NCCL.
    """

    device: torch.device
    ranks: int
    shared: bool
    group: dist.ProcessGroup

    def describe(self) -> dict[str, object]:
        """What results must name."""
        return {
            "gpu": torch.cuda.get_device_name(self.device),
            "ranks": self.ranks,
            "times_meaningful": not self.shared,
            "pytorch": torch.__version__,
            "cuda": torch.version.cuda,
        }


@dataclass(frozen=True)
class Rates:
    """Bytes a microsecond that this machine reaches: into a rank while all receive, and reading plus writing."""

    link: float
    memory: float

    def floor(self, remote_bytes: float, memory_bytes: float) -> float:
        """Microseconds that moving these takes at least."""
        return max(remote_bytes / self.link, memory_bytes / self.memory)


def add_ranks_argument(parser: argparse.ArgumentParser) -> None:
    """``--ranks``, for :func:`launch`."""
    parser.add_argument("--ranks", type=int, help="processes to start if not under torchrun; default: one a GPU")


def launch(ranks: int | None) -> None:
    """Go on only as one of the processes of ``torchrun``; become it otherwise, with ``ranks`` processes."""
    if torch.cuda.device_count() == 0:
        raise SystemExit("no GPU here: this benchmark measures GPUs")
    if "LOCAL_RANK" not in os.environ:
        count = ranks if ranks is not None else torch.cuda.device_count()
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


def start() -> Machine:
    """Join the group of all processes."""
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
    torch.cuda.set_device(device)
    shared = int(os.environ["LOCAL_WORLD_SIZE"]) > gpus
    if shared:
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    dist.init_process_group("gloo" if shared else "nccl", device_id=None if shared else device)
    group = dist.group.WORLD
    assert group is not None
    machine = Machine(device, dist.get_world_size(), shared, group)
    say(f"{torch.cuda.get_device_name(device)} x {machine.ranks}, PyTorch {torch.__version__}")
    if shared:
        say(SHARED_WARNING)
    return machine


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def measure_rates(machine: Machine) -> Rates:
    """Copies on all ranks at once: within the GPU, and from the next rank's. One rank has links without end."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    memory = 2 * COPY_BYTES / _time_copy(source, target)
    link = float("inf")
    if machine.ranks > 1:
        mine = symmetric_memory.empty(COPY_BYTES, dtype=torch.uint8, device=machine.device)
        mapped = symmetric_memory.rendezvous(mine, machine.group.group_name)
        peer = mapped.get_buffer((dist.get_rank() + 1) % machine.ranks, (COPY_BYTES,), torch.uint8)
        link = COPY_BYTES / _time_copy(peer, target)
    say(f"rates: links {link / 1e3:.0f} GB/s, memory {memory / 1e6:.2f} TB/s")
    return Rates(link, memory)


def _time_copy(source: Tensor, target: Tensor) -> float:
    """Microseconds of a copy while all ranks make one; of the slowest rank."""
    times = []
    for _ in range(COPIES):
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000.0)
    slowest = torch.tensor(min(times), device=target.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)
