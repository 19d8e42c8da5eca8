"""Run an example program on several processes: what torchrun does for programs that end by themselves.

Its own start and the imports of every process take longer than a tiny model takes to train. What torchrun itself does,
such as ending all processes when one dies, is left to tests that start it.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist
from forking import quickest


@dataclass(frozen=True)
class Ended:
    """How a program has ended.

    Attributes:
        returncode: 0, or that of the first process that failed.
        stdout: of all processes, one after the other.
        stderr: likewise.
    """

    returncode: int
    stdout: str
    stderr: str


class Program:
    """A program that runs on ``processes`` processes of one world."""

    def __init__(self, script: Path, arguments: list[str], processes: int, folder: Path) -> None:
        """Start it.

        Args:
            script: a file to run as ``__main__``.
            arguments: of the command line.
            processes: how many.
            folder: where files with their output may lie.
        """
        # As torchrun does: processes then need not agree on a free port.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [(folder / f"stdout_{rank}", folder / f"stderr_{rank}") for rank in range(processes)]
        self._processes: list[BaseProcess] = []
        for rank, outputs in enumerate(self._outputs):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            # A daemon: a test that fails before it waits leaves nothing behind.
            process = quickest().Process(target=_run, args=(script, arguments, environment, outputs), daemon=True)
            process.start()
            self._processes.append(process)

    def wait(self, timeout_s: float) -> Ended:
        """Wait until all processes have ended; when one fails, end the others."""
        deadline = time.monotonic() + timeout_s
        running, returncode = list(self._processes), 0
        try:
            while running and not returncode:
                ended = wait([process.sentinel for process in running], timeout=deadline - time.monotonic())
                assert ended, f"still running after {timeout_s} s: {self._written()}"
                for process in [process for process in running if process.exitcode is not None]:
                    running.remove(process)
                    returncode = returncode or process.exitcode or 0
        finally:
            self.kill()
        return Ended(returncode, *self._written())

    def kill(self) -> None:
        """End all processes that have not ended."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _written(self) -> list[str]:
        """What all processes have printed, and their errors."""
        return ["".join(file.read_text() for file in files) for files in zip(*self._outputs, strict=True)]


def _run(script: Path, arguments: list[str], environment: dict[str, str], outputs: tuple[Path, Path]) -> None:
    for path, stream in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
