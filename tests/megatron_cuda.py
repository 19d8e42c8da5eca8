"""What Megatron asks of CUDA: as it is on a GPU, answered by stand-ins on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.pipeline_parallel import utils as schedule_utils
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor
from torch.overrides import TorchFunctionMode


class NoEvent:
    """A CUDA event where there is no CUDA: everything runs at once, in the order of the host."""

    def record(self, stream: object) -> None: ...

    def wait(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


class NoStream:
    """A CUDA stream where there is no CUDA."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def record_event(self) -> NoEvent:
        return NoEvent()


class OnCpu(TorchFunctionMode):
    """Tensors that are made on ``cuda`` lie on the CPU, and all of them give a CUDA type as theirs."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if function is Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


_STREAM = NoStream()
_STAND_INS: dict[str, Any] = {
    "torch.cuda.Event": NoEvent,
    "torch.cuda.Stream": NoStream,
    "torch.cuda.stream": lambda stream: contextlib.nullcontext(),
    "torch.cuda.current_stream": lambda *device: _STREAM,
    "torch.cuda.current_device": lambda: torch.device("cpu"),
    "torch.cuda.nvtx.range_push": lambda name: None,
    "torch.cuda.nvtx.range_pop": lambda: None,
    "torch.Tensor.record_stream": lambda tensor, stream: None,
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": lambda **kwargs: torch.empty(0, dtype=torch.uint8),
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": lambda state, **kwargs: None,
}


@contextlib.contextmanager
def cuda_for_megatron(device: torch.device) -> Iterator[None]:
    """Lets Megatron run on ``device``, its layers, schedules, data parallelism and optimizers."""
    with contextlib.ExitStack() as stack:
        # Without TransformerEngine the router of 0.16 asks for a name that was never imported.
        stack.enter_context(mock.patch("megatron.core.transformer.moe.moe_utils.te_general_gemm", None, create=True))
        if device.type == "cuda":
            model_parallel_cuda_manual_seed(1)  # asked for by recompute
        else:
            stack.enter_context(OnCpu())
            for name, stand_in in _STAND_INS.items():
                stack.enter_context(mock.patch(name, stand_in))
            stack.enter_context(_sizes_as_on_a_gpu())
        yield


@contextlib.contextmanager
def overlapped_schedule(device: torch.device) -> Iterator[None]:
    """What the combined 1F1B schedule needs besides: its streams, and linear layers with delayed weight gradients."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda_for_megatron(device))
        if device.type == "cuda":
            schedule_utils.set_streams()
        for kind in ("ColumnParallelLinear", "RowParallelLinear"):
            # delay_wgrad_compute is made for TransformerEngine's linear layers; Megatron's own lack the method.
            name = f"megatron.core.tensor_parallel.layers.{kind}.backward_dw"
            stack.enter_context(mock.patch(name, lambda layer: None, create=True))
        yield


def _sizes_as_on_a_gpu() -> Any:
    """Megatron's dispatcher turns sizes into NumPy arrays as it moves them to the host."""

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor

    return mock.patch("megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu", on_host)
