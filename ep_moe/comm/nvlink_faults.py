"""What kernels report to the host, as exceptions."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.communicator import too_many_rows


class PeerTimeoutError(RuntimeError):
    """A rank did not do its part in time; the message says what still works.

    Attributes:
        rank: the rank that was waited for, in the expert-parallel group.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class FaultMonitor:
    """The fault report of one communicator: pinned host memory that its kernels write and the host looks at."""

    def __init__(self, rank: int, timeout_s: float, reported: Tensor, after_timeout: str) -> None:
        """Watch.

        Args:
            rank: this one, for messages.
            timeout_s: how long kernels wait, for messages.
            reported: one int32 element on the device that kernels set with the first report.
            after_timeout: what can still be done after a timeout, for messages.
        """
        self._rank, self._timeout_s, self._after_timeout = rank, timeout_s, after_timeout
        self._reported = reported
        self._memory = torch.zeros(ctypes.sizeof(native.FaultReport), dtype=torch.uint8, device="cpu", pin_memory=True)
        self._report = native.FaultReport.from_address(self._memory.data_ptr())

    @property
    def address(self) -> int:
        """Where kernels write."""
        return self._memory.data_ptr()

    def check(self) -> None:
        """Raise what a kernel has reported so far, without waiting for running ones.

        Raises:
            PeerTimeoutError: if a wait for a peer ended in vain; again at every call.
            CapacityError: if more rows arrived than there was room for.
            ValueError: for an expert out of range, or more tokens than the buffer was made for.
        """
        report = self._report
        if report.fault == 0:
            return
        fault, value, allowed = report.fault, report.value, report.allowed
        if fault == native.FAULT_TIMEOUT:
            raise PeerTimeoutError(
                f"rank {self._rank} waited {self._timeout_s:g} s for rank {report.rank} of the expert-parallel group "
                f"(step: {native.STEPS[report.step]}, round {report.round}); {self._after_timeout}",
                report.rank,
            )
        self.forget()
        if fault == native.FAULT_OVERFLOW:
            raise too_many_rows(allowed, value, self._rank)
        if fault == native.FAULT_TOKENS:
            raise ValueError(
                f"x: {value} tokens, but buffers were made for {allowed} a rank; "
                "set phases.<phase>.max_tokens_per_rank to the most that any rank will bring"
            )
        raise ValueError(f"topk_idx: expected experts in [0, {allowed}) (moe.num_experts) or -1, got {value}")

    def forget(self) -> None:
        """Allow the next fault to be reported; waits for the device."""
        torch.cuda.synchronize(self._reported.device)
        ctypes.memset(self._memory.data_ptr(), 0, self._memory.numel())
        self._reported.zero_()
