"""The processes of a run: devices, process groups, and ending together when one of them fails."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ep_moe.config import Config, ConfigError, check_ep_size

INTERRUPTED = 130  # the shell's exit code for Ctrl-C


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: of this process, from 0.
        size: number of processes; all are data-parallel.
        device: where this process computes.
        dtype: of the arithmetic (autocast); parameters are fp32.
        own_gpus: whether all processes are on one host, each with a GPU of its own.
    """

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    own_gpus: bool

    @property
    def is_main(self) -> bool:
        """Whether this process reports."""
        return self.rank == 0


@contextlib.contextmanager
def join_processes(config: Config) -> Iterator[World]:
    """Form Megatron's process groups from torchrun's environment, and leave them at the end.

    Raises:
        ConfigError: if the configuration does not fit the number of processes or the machine.
    """
    device = _device(config.training.device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ep_size = config.moe.ep_size if config.moe.ep_size is not None else world_size
    _check_sizes(config, world_size, ep_size)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)  # started by python instead of torchrun: a world of one
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # NCCL refuses several processes on one GPU; gloo does not.
    use_nccl = device.type == "cuda" and local_world <= torch.cuda.device_count()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if use_nccl else "gloo",
        timeout=timedelta(seconds=config.training.timeout_s),
        device_id=device if use_nccl else None,
    )
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep_size)
    try:
        dtype = _dtype(config.training.precision, device)
        yield World(dist.get_rank(), dist.get_world_size(), device, dtype, use_nccl and local_world == world_size)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def end_all_on_failure(done: str = "") -> None:
    """Report the exception being handled in one line and end this process, so that torchrun ends the others.

    No farewell to the other processes is attempted: they may be waiting in any collective.

    Args:
        done: a sentence on what is left of the run, for the message.
    """
    rank = os.environ.get("RANK", "0")
    error = sys.exc_info()[1]
    if isinstance(error, KeyboardInterrupt):
        code = INTERRUPTED
        message = "\nInterrupted" if rank == "0" else ""
    else:
        code = 1
        if not isinstance(error, ConfigError):
            traceback.print_exc()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"Process {rank} failed: {reason}"
    if message:
        print(f"{message}. {done}".rstrip(), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("training.device = cuda: PyTorch finds no GPU here; use cpu or auto")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def _check_sizes(config: Config, world_size: int, ep_size: int) -> None:
    if world_size % ep_size:
        raise ConfigError(f"moe.ep_size = {ep_size}: must divide the number of processes ({world_size})")
    check_ep_size(config.moe.num_experts, ep_size)
    batch = config.training.global_batch_size
    if batch % world_size:
        raise ConfigError(
            f"training.global_batch_size = {batch}: must be divisible by the number of processes ({world_size})"
        )
    micro = config.training.micro_batch_size
    if micro is not None and (batch // world_size) % micro:
        raise ConfigError(
            f"training.micro_batch_size = {micro}: must divide the {batch // world_size} sequences of each process"
        )
