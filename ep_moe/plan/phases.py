"""One MoE layer in one phase on some number of GPUs: exchanges, experts, buffers."""

from __future__ import annotations

from dataclasses import dataclass

from ep_moe.config import Config
from ep_moe.experts.activation import is_gated
from ep_moe.plan.buffers import low_latency_buffer, normal_buffer
from ep_moe.plan.rates import Rates
from ep_moe.plan.routing import TokenSpread, Topology, simulate_routing, spread_of, topology_of
from ep_moe.plan.times import (
    Exchange,
    experts_time,
    low_latency_combine,
    low_latency_dispatch,
    normal_combine,
    normal_dispatch,
)
from ep_moe.plan.traffic import traffic_of


@dataclass(frozen=True)
class PhasePlan:
    """One layer in one phase; times in microseconds, nothing overlapped.

    Attributes:
        phase: train, prefill or decode.
        tokens: of each rank.
        local_experts: of each rank.
        dispatch: forward.
        combine: forward.
        experts: forward GEMMs.
        forward: dispatch, experts and combine.
        backward: the same with gradients, for train, else 0: a dispatch of bf16 rows along known routes, a combine,
            and twice the GEMMs.
        buffer_bytes: symmetric memory of a rank.
    """

    phase: str
    tokens: int
    local_experts: int
    dispatch: Exchange
    combine: Exchange
    experts: float
    forward: float
    backward: float
    buffer_bytes: int


@dataclass(frozen=True)
class GpuPlan:
    """All phases on one number of GPUs.

    Attributes:
        gpus: in all.
        topology: of one expert-parallel group.
        spread: of a token.
        phases: train, prefill and decode.
    """

    gpus: int
    topology: Topology
    spread: TokenSpread
    phases: tuple[PhasePlan, ...]

    @property
    def groups(self) -> int:
        """Expert-parallel groups side by side: more GPUs than experts hold copies of them."""
        return self.gpus // self.topology.ranks


def plan_gpus(
    config: Config, gpus: list[int], *, ranks_per_node: int, rates: Rates, tokens: int | None = None
) -> list[GpuPlan]:
    """Plan the layer of ``config`` on each number of GPUs.

    Args:
        config: of the model; ``moe.ep_size`` is left aside: the experts are spread as far as they go.
        gpus: numbers of GPUs.
        ranks_per_node: GPUs of an NVLink domain.
        rates: of the hardware.
        tokens: of each rank in normal mode; ``None`` for ``max_tokens_per_rank`` of the phase, or else one sequence.

    Raises:
        ConfigError: if the experts cannot be spread evenly over so many GPUs.
    """
    topk_idx = simulate_routing(config.moe)
    plans = []
    for count in gpus:
        topology = topology_of(config.moe, count, ranks_per_node)
        spread = spread_of(topk_idx, config.moe.num_experts, topology)
        phases = tuple(
            plan_phase(config, phase, topology, spread, rates, tokens) for phase in ("train", "prefill", "decode")
        )
        plans.append(GpuPlan(count, topology, spread, phases))
    return plans


def plan_phase(
    config: Config, phase: str, topology: Topology, spread: TokenSpread, rates: Rates, tokens: int | None
) -> PhasePlan:
    """Plan one phase; arguments as :func:`plan_gpus`."""
    model, moe, settings = config.model, config.moe, getattr(config.phases, phase)
    fp8, hidden = settings.dispatch_dtype == "fp8", model.hidden_size
    low_latency = settings.mode == "low_latency"
    most = settings.max_tokens_per_rank
    if tokens is None or low_latency:
        tokens = most if most is not None else config.data.sequence_length
    traffic = traffic_of(tokens, hidden, moe.top_k, spread, topology)
    if low_latency:
        dispatch = low_latency_dispatch(traffic, rates, fp8=fp8)
        combine = low_latency_combine(traffic, rates)
        buffer = low_latency_buffer(topology, tokens, hidden, moe.top_k, fp8)
    else:
        dispatch = normal_dispatch(traffic, rates, fp8=fp8, sms=settings.num_sms)
        combine = normal_combine(traffic, rates, sms=settings.num_sms)
        buffer = normal_buffer(topology, tokens, hidden)
    local_experts = moe.num_experts // topology.ranks
    experts = experts_time(
        traffic.slots,
        local_experts,
        hidden,
        moe.experts.ffn_hidden_size,
        is_gated(moe.experts.activation),
        rates,
    )
    backward = 0.0
    if phase == "train":
        gradients = normal_dispatch(traffic, rates, fp8=False, sms=settings.num_sms).time - rates.layout
        backward = gradients + 2 * experts + combine.time
    forward = dispatch.time + experts + combine.time
    return PhasePlan(phase, tokens, local_experts, dispatch, combine, experts, forward, backward, buffer)
