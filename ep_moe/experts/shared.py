"""Shared experts: a feed-forward network that every token passes beside the routed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_moe.config import SharedExpertsConfig
from ep_moe.experts.activation import apply_activation, fc1_width


class SharedExperts(nn.Module):
    """``fc2(act(fc1(x)))``, optionally scaled per token by a sigmoid gate (DeepSeekMoE, arXiv 2401.06066).

    Several shared experts side by side are one network with their summed inner width. The gate is that of
    Qwen2-MoE (arXiv 2407.10671).

    Args:
        hidden_size: width of the tokens.
        config: inner width and whether to gate.
        activation: as of the routed experts (see :func:`~ep_moe.experts.activation.apply_activation`).
        init_method: fills the first projection and the gate in place.
        output_init_method: fills the second projection in place.
        device: of the parameters. Nothing is initialised on meta.
        dtype: of the parameters.

    Attributes:
        fc1_weight: ``[fc1 width, hidden]``; the width is ``2 * ffn`` for gated activations, gate then up.
        fc2_weight: ``[hidden, ffn]``.
        gate_weight: ``[1, hidden]``, or ``None`` without gate.

    Raises:
        ValueError: if a size is not positive or the activation unknown.
    """

    gate_weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        config: SharedExpertsConfig,
        activation: str,
        *,
        init_method: Callable[[Tensor], Any],
        output_init_method: Callable[[Tensor], Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ffn = config.ffn_hidden_size
        if hidden_size < 1 or ffn < 1:
            raise ValueError(
                f"hidden_size, moe.shared_experts.ffn_hidden_size: expected at least 1 each, got {hidden_size}, {ffn}"
            )
        self.hidden_size = hidden_size
        self.activation = activation
        width = fc1_width(activation, ffn)
        self.fc1_weight = nn.Parameter(torch.empty(width, hidden_size, device=device, dtype=dtype))
        self.fc2_weight = nn.Parameter(torch.empty(hidden_size, ffn, device=device, dtype=dtype))
        gate = nn.Parameter(torch.empty(1, hidden_size, device=device, dtype=dtype)) if config.gate else None
        self.register_parameter("gate_weight", gate)
        for parameter, method in (
            (self.fc1_weight, init_method),
            (self.fc2_weight, output_init_method),
            (gate, init_method),
        ):
            if parameter is not None and parameter.device.type != "meta":
                with torch.no_grad():
                    method(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the network on every token.

        Args:
            x: ``[..., hidden]`` in the dtype of the parameters, or any under ``torch.autocast``.

        Returns:
            ``[..., hidden]`` in the dtype of the computation.

        Raises:
            ValueError: if the width or dtype of ``x`` does not fit.
        """
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: expected [..., {self.hidden_size}] (model.hidden_size), got {list(x.shape)}")
        if x.dtype != self.fc1_weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x: expected {self.fc1_weight.dtype} as the weights, got {x.dtype}")
        inner = apply_activation(F.linear(x, self.fc1_weight), self.activation)
        output = F.linear(inner, self.fc2_weight)
        if self.gate_weight is not None:
            output = output * torch.sigmoid(F.linear(x, self.gate_weight))
        return output
