"""Prefill and decode: a key-value cache for the model's attention, and the loop that samples bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from moe_gpt.model import CausalAttention, moe_layers
from moe_gpt.processes import World


@dataclass(frozen=True)
class Generated:
    """What one process generated.

    Attributes:
        tokens: int64 ``[sequences, length]``, prompts included.
        prefill_s: seconds that the prompts took.
        decode_s: seconds that all steps after them took.
        steps: of decoding.
    """

    tokens: Tensor
    prefill_s: float
    decode_s: float
    steps: int


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


@torch.no_grad()
def generate(
    model: GPTModel, world: World, prompts: Tensor, steps: int, *, temperature: float, generator: torch.Generator
) -> Generated:
    """Continue ``prompts`` (int64 ``[sequences, length]``) by ``steps`` bytes; collective over all processes.

    Prompts pass the layer's prefill phase at once, then each byte its decode phase. ``temperature`` 0 takes the
    likeliest byte, otherwise bytes are drawn with logits divided by it.
    """
    model.eval()
    tokens = prompts.to(world.device)
    length = tokens.shape[1]
    with key_value_caches(model, length + steps) as caches:

        def forward(phase: str, new: Tensor, first: int) -> Tensor:
            positions = torch.arange(first, first + new.shape[1], device=world.device)
            for cache in caches:
                cache.positions = positions
            with contextlib.ExitStack() as stack:
                for layer in moe_layers(model):
                    stack.enter_context(layer.phase(phase))
                dtype = world.dtype
                stack.enter_context(torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32))
                return model(new, positions.expand_as(new), None)[:, -1].float()

        start = clock(world)
        logits = forward("prefill", tokens, 0)
        prefilled = clock(world)
        for step in range(steps):
            tokens = torch.cat([tokens, sample(logits, temperature, generator)], dim=1)
            if step + 1 < steps:
                logits = forward("decode", tokens[:, -1:], length + step)
        return Generated(tokens.cpu(), prefilled - start, clock(world) - prefilled, steps)


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
