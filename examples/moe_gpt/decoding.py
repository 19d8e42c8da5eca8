"""Prefill and decode: a key-value cache for the model's attention, and the loop that samples bytes."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from ep_moe.config import Config
from moe_gpt.model import CausalAttention, moe_layers
from moe_gpt.processes import World


@dataclass(frozen=True)
class Generated:
    """What one process generated.

    Attributes:
        tokens: int64 ``[sequences, length]``, prompts included.
        prefill_s: seconds that the prompts and the first byte behind them took.
        decode_s: seconds that all steps after it took.
        steps: of decoding, each of which made a byte.
        captured: whether these were replays of a CUDA graph.
    """

    tokens: Tensor
    prefill_s: float
    decode_s: float
    steps: int
    captured: bool


class KeyValueCache:
    """Keys and values of all positions so far, of one attention layer; of fixed size.

    Attributes:
        positions: int64 ``[new]``, where the tokens of the next call stand.
    """

    def __init__(self, positions: Tensor, length: int) -> None:
        self.positions = positions
        self._length = length
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep ``[batch, heads, new, head_dim]`` each.

        Returns:
            All keys and values ``[batch, heads, length, head_dim]``, and which of them each new token may look at,
            bool ``[new, length]``.
        """
        if self._keys is None or self._values is None:
            shape = (*key.shape[:2], self._length, key.shape[3])
            self._keys, self._values = key.new_zeros(shape), value.new_zeros(shape)
        self._keys.index_copy_(2, self.positions, key)
        self._values.index_copy_(2, self.positions, value)
        places = torch.arange(self._length, device=key.device)
        return self._keys, self._values, places[None, :] <= self.positions[:, None]


@contextlib.contextmanager
def key_value_caches(model: GPTModel, length: int) -> Iterator[list[KeyValueCache]]:
    """Give every attention layer of ``model`` a cache for ``length`` positions, for the time of the block."""
    device = next(model.parameters()).device
    layers = [module for module in model.modules() if isinstance(module, CausalAttention)]
    caches = [KeyValueCache(torch.zeros(0, dtype=torch.int64, device=device), length) for _ in layers]
    for layer, cache in zip(layers, caches, strict=True):
        layer.cache = cache
    try:
        yield caches
    finally:
        for layer in layers:
            layer.cache = None


def can_capture(config: Config, world: World) -> bool:
    """Whether a decode step can be a CUDA graph: its exchange is that of our kernels, and no GEMM asks for sizes.

    Kernels run between the GPUs of one host. In fp32 the experts are one GEMM each, of a size that the host must know.
    """
    device_sized = world.dtype == torch.bfloat16 and config.moe.experts.backend in ("auto", "native", "grouped_mm")
    by_kernels = config.phases.decode.mode == "low_latency" and config.moe.comm != "portable"
    return world.own_gpus and by_kernels and device_sized


class CapturedStep:
    """Replays ``forward(tokens [sequences, 1], positions [1])``, captured once, with other values."""

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, position: Tensor) -> None:
        """Capture, after a run that allocates what lasts; both compute with the values given."""
        self._tokens, self._position = tokens.clone(), position.clone()
        forward(self._tokens, self._position)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as that of NCCL which looks for errors, may go on.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = forward(self._tokens, self._position)

    def __call__(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The logits, in memory that the next call writes again."""
        self._tokens.copy_(tokens)
        self._position.copy_(position)
        self._graph.replay()
        return self._logits


@torch.no_grad()
def generate(
    model: GPTModel,
    world: World,
    prompts: Tensor,
    steps: int,
    *,
    temperature: float,
    generator: torch.Generator,
    capture: bool,
) -> Generated:
    """Continue ``prompts`` (int64 ``[sequences, length]``) by ``steps`` bytes; collective over all processes.

    Prompts pass the layer's prefill phase at once, then each byte its decode phase, with ``capture`` in a CUDA graph.
    ``temperature`` 0 takes the likeliest byte, otherwise bytes are drawn with logits divided by it.
    """
    model.eval()
    tokens = prompts.to(world.device)
    length = tokens.shape[1]
    with key_value_caches(model, length + steps) as caches:

        def forward(phase: str, new: Tensor, positions: Tensor) -> Tensor:
            for cache in caches:
                cache.positions = positions
            with contextlib.ExitStack() as stack:
                for layer in moe_layers(model):
                    stack.enter_context(layer.phase(phase))
                dtype = world.dtype
                stack.enter_context(torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32))
                return model(new, positions.expand_as(new), None)[:, -1].float()

        draw = functools.partial(sample, temperature=temperature, generator=generator)
        places = torch.arange(length + steps, device=world.device)
        decode: Callable[[Tensor, Tensor], Tensor] = functools.partial(forward, "decode")
        start = clock(world)
        tokens = torch.cat([tokens, draw(forward("prefill", tokens, places[:length]))], dim=1)
        prefill_s = clock(world) - start
        if capture:
            # What it leaves in the caches at this place, the first step overwrites.
            decode = CapturedStep(decode, tokens[:, -1:], places[length : length + 1])
        start = clock(world)
        for place in range(length, length + steps - 1):
            tokens = torch.cat([tokens, draw(decode(tokens[:, -1:], places[place : place + 1]))], dim=1)
        return Generated(tokens.cpu(), prefill_s, clock(world) - start, steps - 1, capture)


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token a sequence, ``[sequences, 1]``."""
    if temperature == 0.0:
        return logits.argmax(1, keepdim=True)
    probabilities = (logits / temperature).softmax(1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).to(logits.device)


def clock(world: World) -> float:
    """Seconds, once the device is done."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
