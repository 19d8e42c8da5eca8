"""Generate text from a checkpoint of ``train_moe.py``: prefill in normal mode, decode in low-latency mode.

    torchrun --nproc-per-node=2 examples/generate.py --config configs/quickstart.yaml --prompt "def main(" --steps 80

Any number of processes may share the experts, whatever number trained them. Each process continues all prompts with
random numbers of its own; the first prints its text and the rates of all together. ``--graph`` makes a decode step a
CUDA graph, where every process has a GPU of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from ep_moe.config import Config, ConfigError
from ep_moe.config_loading import load_config
from moe_gpt.checkpoint import last_checkpoint, load_weights
from moe_gpt.decoding import can_capture, generate
from moe_gpt.model import build_model
from moe_gpt.processes import World, end_all_on_failure, join_processes


def parse_arguments() -> argparse.Namespace:
    """The command line; the model is that of the configuration."""
    parser = argparse.ArgumentParser(description="Generate bytes with a trained Mixture-of-Experts GPT.")
    parser.add_argument("--config", required=True, help="YAML file that the model was trained with")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, repeatable")
    parser.add_argument("--checkpoint", type=Path, help="folder; the last one in training.output_dir if not given")
    parser.add_argument("--prompt", action="append", help="text to continue, repeatable; cut to one length")
    parser.add_argument("--steps", type=int, default=64, help="bytes to generate")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest byte")
    parser.add_argument("--graph", action="store_true", help="capture a decode step in a CUDA graph")
    return parser.parse_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise :class:`ConfigError` for what no model could do."""
    if arguments.steps < 1:
        raise ConfigError(f"--steps = {arguments.steps}: must be at least 1")
    if not 0.0 <= arguments.temperature < math.inf:
        raise ConfigError(f"--temperature = {arguments.temperature:g}: must be a finite number of at least 0")
    if arguments.checkpoint is not None and not (arguments.checkpoint / "shared.pt").is_file():
        raise ConfigError(f"--checkpoint = {arguments.checkpoint}: not a folder that train_moe.py has written")


def with_decode_mode(arguments: argparse.Namespace, sequences: int) -> Config:
    """The configuration, with low-latency decoding unless it sets a decode phase itself."""
    config = load_config(arguments.config, arguments.set)
    if any(override.startswith("phases.decode") for override in arguments.set):
        return config
    decode = ["phases.decode.mode=low_latency", f"phases.decode.max_tokens_per_rank={sequences}"]
    return load_config(arguments.config, arguments.set + decode)


def read_prompts(arguments: argparse.Namespace) -> torch.Tensor:
    """Prompts as bytes, ``[prompts, length]``."""
    prompts = [text.encode() for text in arguments.prompt or ["def "]]
    length = min(len(prompt) for prompt in prompts)
    if length == 0:
        raise ConfigError("--prompt: must not be empty")
    return torch.tensor([list(prompt[:length]) for prompt in prompts])


def run(arguments: argparse.Namespace, config: Config, world: World, prompts: torch.Tensor) -> None:
    """Load, generate, print."""
    length = prompts.shape[1] + arguments.steps
    if length > config.data.sequence_length:
        raise ConfigError(
            f"--steps = {arguments.steps}: prompt and text have {length} bytes, the model takes "
            f"{config.data.sequence_length} (data.sequence_length)"
        )
    if arguments.graph and not can_capture(config, world):
        raise ConfigError(
            "--graph: needs a GPU a process, bf16, phases.decode.mode: low_latency, a moe.comm other than portable and "
            "moe.experts.backend auto, native or grouped_mm"
        )
    folder = arguments.checkpoint or last_checkpoint(config)
    if folder is None:
        raise ConfigError(f"training.output_dir = {config.training.output_dir}: holds no checkpoint; train first")
    model = build_model(config, world.device)
    load_weights(folder, config, model)
    generator = torch.Generator().manual_seed(config.training.seed + world.rank)
    sampling = {"temperature": arguments.temperature, "generator": generator}
    result = generate(model, world, prompts, arguments.steps, capture=arguments.graph, **sampling)
    if world.is_main:
        for text in result.tokens.tolist():
            print(bytes(text).decode(errors="replace"), end="\n---\n")
        sequences = world.size * len(prompts)
        how = config.phases.decode.mode + (", CUDA graph" if result.captured else "")
        line = f"{folder}: prefill {sequences * prompts.shape[1] / result.prefill_s:.0f} tokens/s"
        if result.steps:
            line += (
                f", decode ({how}) {sequences * result.steps / result.decode_s:.0f} tokens/s, "
                f"{1e3 * result.decode_s / result.steps:.2f} ms a step of {sequences} sequences"
            )
        print(f"{line} on {world.size} x {world.device.type}", flush=True)


@record
def main() -> None:
    """Read the command line and generate; one process of several."""
    arguments = parse_arguments()
    try:
        check_arguments(arguments)
        prompts = read_prompts(arguments)
        config = with_decode_mode(arguments, len(prompts))
        with join_processes(config) as world:
            run(arguments, config, world, prompts)
    except (Exception, KeyboardInterrupt):
        end_all_on_failure()
    # Skips the interpreter's teardown, in which the threads of communication libraries can outlive their state.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
