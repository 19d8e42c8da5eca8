"""Run a function on several ranks: a pool of processes joined in one gloo group, reused between tests.

Starting a process can cost seconds (importing torch), so a pool of each size is started once and kept. A test
function is a module-level function called as ``function(rank, world_size, *args)`` on every rank.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import multiprocessing.util  # registers its exit handler, which joins processes, before ours below ends them
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from forking import Context, quickest

_GROUP_TIMEOUT = timedelta(seconds=60)
_CALL_TIMEOUT_S = 60.0
_pools: dict[int, RankPool] = {}


class RankError(AssertionError):
    """A function failed on some rank; the message holds the tracebacks."""


class RankPool:
    """Processes ``0 .. world_size - 1`` of one gloo group, waiting for functions to run."""

    def __init__(self, world_size: int, context: Context | None = None) -> None:
        context = context or quickest()
        store = tempfile.NamedTemporaryFile(prefix="ep_moe_store_", delete=False)  # noqa: SIM115
        self.connections: list[Connection] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, store.name, theirs))
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(rank, world_size, *args)`` on every rank; results in rank order."""
        for connection in self.connections:
            connection.send((function, args))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        pending = dict(enumerate(self.connections))
        while pending:
            ready = wait(list(pending.values()), timeout=_CALL_TIMEOUT_S)
            if not ready:
                errors.update({rank: f"no answer within {_CALL_TIMEOUT_S} s" for rank in pending})
                break
            for rank in [r for r, c in pending.items() if c in ready]:
                try:
                    ok, value = pending.pop(rank).recv()
                except EOFError:
                    ok, value = False, "the process died"
                (results if ok else errors)[rank] = value
        if errors:
            raise RankError("\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(errors.items())))
        return [results[rank] for rank in range(len(self.connections))]

    def close(self) -> None:
        """End the processes: by closing their pipes, so that they can end their own children, or by force."""
        for connection in self.connections:
            connection.close()
        deadline = time.monotonic() + 2
        for process in self.processes:
            process.join(timeout=max(deadline - time.monotonic(), 0))
            process.kill()


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on ``world_size`` processes; results in rank order.

    Raises:
        RankError: with the traceback of every rank that failed; the pool is then thrown away, because its
            ranks may have stopped at different collectives.
    """
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    try:
        return _pools[world_size].run(function, *args)
    except RankError:
        _pools.pop(world_size).close()
        raise


def join_over_nccl(rank: int, world_size: int, store: str) -> None:
    """Make the processes of a pool one group over NCCL, each with a GPU of its own; run by all of them.

    Args:
        rank: of this process.
        world_size: of the pool.
        store: name of a file that does not exist.
    """
    torch.cuda.set_device(rank)
    dist.destroy_process_group()
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=rank, world_size=world_size)


def subgroup(world_size: int, size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Split the world into consecutive groups of ``size`` (expert parallel) and the groups across them.

    Returns:
        This rank's group of ``size`` consecutive ranks, and its group of ranks with the same place in theirs.
    """
    rank = dist.get_rank()
    inner = [list(range(start, start + size)) for start in range(0, world_size, size)]
    outer = [list(range(place, world_size, size)) for place in range(size)]
    groups = {tuple(ranks): _cached_group(tuple(ranks)) for ranks in itertools.chain(inner, outer)}
    return groups[tuple(inner[rank // size])], groups[tuple(outer[rank % size])]


_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def _cached_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(ranks))
    return _groups[ranks]


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"] = str(rank), str(world_size), str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=_GROUP_TIMEOUT
    )
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(rank, world_size, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


@atexit.register
def _close_pools() -> None:
    for pool in _pools.values():
        pool.close()
