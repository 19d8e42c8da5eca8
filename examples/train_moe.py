"""Train a Mixture-of-Experts GPT on bytes: Megatron-Core's ``GPTModel`` with ``ep_moe``'s layer.

    torchrun --nproc-per-node=2 examples/train_moe.py --config configs/quickstart.yaml

Runs on GPUs where there are GPUs and on CPUs elsewhere, with any number of processes. Leaves ``metrics.csv``,
``curves.png`` and checkpoints in ``training.output_dir``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from ep_moe.config import Config, ConfigError
from ep_moe.config_loading import load_config
from ep_moe.config_training import TrainingConfig
from ep_moe.tracing import annotate_stages, trace
from moe_gpt.bigram import bigram_loss
from moe_gpt.checkpoint import last_checkpoint
from moe_gpt.corpus import load_corpus
from moe_gpt.processes import World, end_all_on_failure, join_processes
from moe_gpt.report import RunReport
from moe_gpt.trainer import Trainer

PROFILED_STEPS = range(3, 6)


def parse_arguments() -> argparse.Namespace:
    """The command line; everything else is in the configuration."""
    parser = argparse.ArgumentParser(description="Train a Mixture-of-Experts GPT on bytes.")
    parser.add_argument("--config", required=True, help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, repeatable")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="short for --set training.device=...")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    parser.add_argument("--profile", action="store_true", help="write a trace of a few steps that a browser opens")
    parser.add_argument("--nvtx", action="store_true", help="mark the stages of MoE layers for Nsight Systems")
    return parser.parse_args()


def run(config: Config, trainer: Trainer, world: World, resume: bool, profile: bool) -> None:
    """Train from the trainer's state to ``training.steps``."""
    training = config.training
    if resume:
        folder = last_checkpoint(config)
        if folder is None:
            raise ConfigError(f"training.output_dir = {training.output_dir}: holds no checkpoint to resume from")
        trainer.resume(folder)
    if profile and training.steps - trainer.step <= PROFILED_STEPS.start:
        raise ConfigError(
            f"training.steps = {training.steps}: --profile records from the {PROFILED_STEPS.start + 1}th step of a run "
            f"on, this one would take {max(training.steps - trainer.step, 0)}"
        )
    baseline = bigram_loss(trainer.corpus.train, trainer.corpus.validation) if world.is_main else None
    report = RunReport(training.output_dir, world.is_main, training.steps, trainer.step, baseline)
    report.message(f"Text: {trainer.corpus.description}")
    report.message(f"Processes: {world.size} on {world.device.type}, {str(world.dtype).removeprefix('torch.')}")
    if trainer.step:
        report.message(f"Resumed after step {trainer.step}")
    path, first = Path(training.output_dir) / "trace.json", trainer.step
    with profiler(path, trainer.model, enabled=profile and world.is_main) as on_step:
        while trainer.step < training.steps:
            on_step(trainer.step - first)
            result = trainer.train_step()
            report.advance()
            last = trainer.step == training.steps
            validate = last or trainer.step % training.eval_interval == 0
            if validate or trainer.step % training.log_interval == 0:
                report.log(trainer.metrics(result, trainer.validate() if validate else None))
            if saves_after(trainer.step, training):
                report.message(f"Checkpoint: {trainer.save()}")
    report.finish()


def saves_after(step: int, training: TrainingConfig) -> bool:
    """Whether a checkpoint is due after ``step`` steps."""
    interval = training.checkpoint_interval
    return interval is not None and (step == training.steps or (interval > 0 and step % interval == 0))


@contextlib.contextmanager
def profiler(path: Path, model: nn.Module, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call before each step of this run; writes the trace of ``PROFILED_STEPS`` to ``path``."""
    with contextlib.ExitStack() as running:

        def say_where(failure: object, *_: object) -> None:
            if failure is None:  # otherwise nothing was written
                print(f"Trace: {path} (open in chrome://tracing or ui.perfetto.dev)", file=sys.stderr)

        def on_step(step: int) -> None:
            if enabled and step == PROFILED_STEPS.start:
                running.push(say_where)
                running.enter_context(trace(path, model))
            elif step == PROFILED_STEPS.stop:
                running.close()

        yield on_step


@record
def main() -> None:
    """Read the command line and train; one process of several."""
    arguments = parse_arguments()
    trainer: Trainer | None = None
    config: Config | None = None
    try:
        device = [f"training.device={arguments.device}"] if arguments.device else []
        config = load_config(arguments.config, arguments.set + device)
        corpus = load_corpus(config.data)
        with join_processes(config) as world:
            trainer = Trainer(config, corpus, world)
            annotate_stages(trainer.model, on=arguments.nvtx)
            run(config, trainer, world, arguments.resume, arguments.profile)
    except (Exception, KeyboardInterrupt):
        checkpoint = last_checkpoint(config) if config else None
        end_all_on_failure(f"Steps done: {trainer.step if trainer else 0}. Last checkpoint: {checkpoint or 'none'}.")
    # Skips the interpreter's teardown, in which the threads of communication libraries can outlive their state.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
