"""``python -m ep_moe plan``: bytes, buffers, messages and times of a layer on 8 to thousands of GPUs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ep_moe.config import Config, ConfigError
from ep_moe.config_loading import load_config
from ep_moe.plan.host import host_tables
from ep_moe.plan.phases import GpuPlan, plan_gpus
from ep_moe.plan.rates import Rates, rates_with
from ep_moe.plan.report import draw, phase_table, routing_table
from ep_moe.plan.routing import spreads

SMALLEST, RANKS_PER_NODE = 8, 8
DESCRIPTION = "what an expert-parallel layer moves, holds and waits for on some number of GPUs (docs/plan.md)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--gpus",
        type=int,
        required=True,
        help=f"most GPUs; smaller powers of two from {SMALLEST} too, where they divide the experts",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the model")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the file")
    parser.add_argument("--ranks-per-node", type=int, help=f"GPUs of an NVLink domain; default {RANKS_PER_NODE}")
    parser.add_argument("--tokens", type=int, help="per rank in normal mode; default: of the configuration")
    parser.add_argument("--rate", action="append", default=[], metavar="NAME=NUMBER", help="see ep_moe/plan/rates.py")
    parser.add_argument(
        "--benchmarks", action="store_true", help="what the benchmarks of exchanges should measure on a host of --gpus"
    )
    parser.add_argument("--out", type=Path, help="PNG file to write")


def main(arguments: argparse.Namespace) -> int:
    """Print tables, write the picture; returns the exit code."""
    try:
        config, rates = load_config(arguments.config, arguments.set), rates_with(arguments.rate)
        _check(arguments)
        if arguments.benchmarks:
            tokens = arguments.tokens if arguments.tokens is not None else config.data.sequence_length
            print(host_tables(config, arguments.gpus, rates, tokens))
            return 0
        per_node = RANKS_PER_NODE if arguments.ranks_per_node is None else arguments.ranks_per_node
        plans = plan_gpus(
            config,
            gpu_counts(config, arguments.gpus, per_node),
            ranks_per_node=per_node,
            rates=rates,
            tokens=arguments.tokens,
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(report(config, plans, rates))
    if arguments.out is not None:
        try:
            draw(plans, arguments.out)
        except ImportError:
            print("no picture: pip install matplotlib", file=sys.stderr)
            return 1
        except (OSError, ValueError) as error:  # no such folder, no such format
            print(f"--out {arguments.out}: cannot be written ({error})", file=sys.stderr)
            return 1
    return 0


def gpu_counts(config: Config, most: int, ranks_per_node: int) -> list[int]:
    """Powers of two from 8 below ``most`` over which the experts can be spread, and ``most``."""
    counts = [SMALLEST << i for i in range(most.bit_length()) if SMALLEST << i < most]
    return [*(count for count in counts if spreads(config.moe, count, ranks_per_node)), most]


def report(config: Config, plans: list[GpuPlan], rates: Rates) -> str:
    """The tables, with what they rest on."""
    router, model = config.moe.router, config.model
    layers = model.num_layers - model.num_dense_layers
    limited = f"the best {router.group_topk} of {router.num_groups} groups" if router.num_groups else "no group limit"
    lines = [
        f"{layers} MoE layers of hidden {model.hidden_size}, top-{config.moe.top_k} of {config.moe.num_experts}, "
        f"{limited}. One layer; bytes into one rank, dispatch + combine; times if nothing overlaps.",
        f"Rates: NVLink {rates.nvlink_pull:g} pulled, {rates.nvlink_push:g} pushed, RDMA {rates.rdma:g} GB/s.",
        "",
        routing_table(plans),
    ]
    for number, phase in enumerate(plans[0].phases):
        settings = getattr(config.phases, phase.phase)
        mode = f"{settings.mode}, rows {settings.dispatch_dtype}"
        lines += ["", f"{phase.phase} ({mode}, {phase.tokens} tokens a rank):", "", phase_table(plans, number)]
    return "\n".join(lines)


def _check(arguments: argparse.Namespace) -> None:
    for name in ("gpus", "ranks_per_node", "tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("ranks_per_node", "out"):
        if arguments.benchmarks and getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: not with --benchmarks")
