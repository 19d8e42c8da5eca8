"""What the benchmarks of exchanges should measure on one host, line by line: predictions for a run to prove wrong."""

from __future__ import annotations

from collections.abc import Sequence

from ep_moe.comm.communicator import RowLayout
from ep_moe.config import Config
from ep_moe.plan.rates import Rates
from ep_moe.plan.report import markdown_table
from ep_moe.plan.routing import TokenSpread, Topology, simulate_routing, spread_of, spreads, topology_of
from ep_moe.plan.times import low_latency_combine, low_latency_dispatch, normal_combine, normal_dispatch
from ep_moe.plan.traffic import traffic_of

SM_BUDGETS = (16, 32, 64, 128)
DECODE_TOKENS = (1, 8, 64, 128, 256, 512)
LAYOUTS: tuple[RowLayout, ...] = ("rows", "expert_major")


def host_tables(config: Config, gpus: int, rates: Rates, tokens: int) -> str:
    """Predictions of ``benchmarks/normal.py`` and ``benchmarks/low_latency.py``.

    Args:
        config: of the model.
        gpus: of the largest host; smaller powers of two are predicted too.
        rates: of the hardware.
        tokens: of each rank in normal mode.

    Raises:
        ConfigError: if the experts cannot be spread evenly over so many GPUs.
    """
    topk_idx = simulate_routing(config.moe)
    hosts = []
    smaller = (1 << i for i in range(1, gpus.bit_length()) if 1 << i < gpus)
    for ranks in [*(count for count in smaller if spreads(config.moe, count, count)), gpus]:
        topology = topology_of(config.moe, ranks, ranks)
        hosts.append((topology, spread_of(topk_idx, config.moe.num_experts, topology)))
    return "\n\n".join([_normal_table(config, hosts, rates, tokens), _low_latency_table(config, hosts, rates)])


def _normal_table(config: Config, hosts: Sequence[tuple[Topology, TokenSpread]], rates: Rates, tokens: int) -> str:
    rows = []
    for topology, spread in hosts:
        traffic = traffic_of(tokens, config.model.hidden_size, config.moe.top_k, spread, topology)

        def line(what: str, times: Sequence[float], remote: float, ranks: int = topology.ranks) -> None:
            rows.append((ranks, what, f"{remote / 1e6:.0f}", *(f"{time:.0f}" for time in times)))

        for fp8 in (True, False):
            for layout in LAYOUTS:
                exchanges = [normal_dispatch(traffic, rates, fp8=fp8, layout=layout, sms=n) for n in SM_BUDGETS]
                name = f"dispatch {'FP8' if fp8 else 'bf16'}, `{layout}`"
                line(name, [x.time for x in exchanges], exchanges[0].nvlink_bytes)
        exchanges = [normal_combine(traffic, rates, sms=n) for n in SM_BUDGETS]
        line("combine bf16, `expert_major`", [x.time for x in exchanges], exchanges[0].nvlink_bytes)
    return markdown_table(("ranks", "normal mode, us", "remote MB", *(f"{n} SMs" for n in SM_BUDGETS)), rows)


def _low_latency_table(config: Config, hosts: Sequence[tuple[Topology, TokenSpread]], rates: Rates) -> str:
    rows = []
    for topology, spread in hosts:
        for tokens in DECODE_TOKENS:
            traffic = traffic_of(tokens, config.model.hidden_size, config.moe.top_k, spread, topology)
            fp8, bf16 = (low_latency_dispatch(traffic, rates, fp8=fp8).time for fp8 in (True, False))
            combine = low_latency_combine(traffic, rates).time
            times = (fp8, bf16, combine, fp8 + combine)
            rows.append((topology.ranks, tokens, *(f"{time:.1f}" for time in times)))
    head = ("ranks", "tokens", "dispatch FP8, us", "dispatch bf16", "combine", "round trip FP8")
    return markdown_table(head, rows)
