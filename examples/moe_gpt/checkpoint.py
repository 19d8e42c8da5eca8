"""Checkpoints: complete enough that a resumed run repeats the losses of an uninterrupted one.

A checkpoint is a folder ``step_00000100`` with ``shared.pt`` (what every process holds alike, the configuration and
the step) and one ``experts_{i}.pt`` per expert-parallel rank. Parameters and their optimizer state lie side by side
by name, so a run may resume with another number of processes. A folder appears under its name only when complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from ep_moe.config import Config, ConfigError
from ep_moe.config_fields import format_value
from ep_moe.config_loading import config_to_dict

State = dict[str, Any]

# Keys of moe that say how it is run.
_NOT_THE_MODEL = (
    *(f"moe.comm{rest}" for rest in ("", "_ranks_per_node", "_between_nodes", "_timeout_s")),
    *(f"moe.experts.{key}" for key in ("backend", "precision", "wgrad_precision", "recompute_activation")),
    "moe.ep_size",
    "moe.capacity_rows",
)


def save_checkpoint(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, corpus_digest: str
) -> Path:
    """Write the state after ``step`` steps; collective over all processes. Returns the folder."""
    folder = _folder(config, step)
    partial = folder.with_name(f".{folder.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    experts, shared = _states(model, optimizer)
    if parallel_state.get_expert_data_parallel_rank() == 0:
        torch.save(experts, partial / f"experts_{parallel_state.get_expert_model_parallel_rank()}.pt")
    if dist.get_rank() == 0:
        buffers = {name: value for name, value in model.named_buffers() if name.endswith("expert_bias")}
        header = {"step": step, "corpus": corpus_digest, "config": config_to_dict(config)}
        torch.save({"header": header, "state": shared, "buffers": buffers}, partial / "shared.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def last_checkpoint(config: Config) -> Path | None:
    """The newest complete checkpoint in ``training.output_dir``."""
    folders = sorted(Path(config.training.output_dir).glob("step_*/shared.pt"))
    return folders[-1].parent if folders else None


def load_checkpoint(
    folder: Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, corpus_digest: str
) -> int:
    """Restore model and optimizer; returns the number of steps done.

    Raises:
        ConfigError: if the checkpoint is of another model or another text.
    """
    saved = _restore(folder, config, model, optimizer)
    if saved["header"]["corpus"] != corpus_digest:
        raise ConfigError(
            f"data.path = {config.data.path}: the text is not the one the checkpoint {folder} was trained on"
        )
    return saved["header"]["step"]


def load_weights(folder: Path, config: Config, model: nn.Module) -> None:
    """Restore the model alone.

    Raises:
        ConfigError: if the checkpoint is of another model.
    """
    _restore(folder, config, model, None)


def _restore(folder: Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> State:
    """Fill the model, and the optimizer if there is one; returns what ``shared.pt`` holds."""
    saved = torch.load(folder / "shared.pt", map_location="cpu", weights_only=True)
    _check_model(folder, saved["header"], config)
    files = [folder / f"experts_{i}.pt" for i in range(len(list(folder.glob("experts_*.pt"))))]
    parts = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
    for name, parameter in model.named_parameters():
        if name in parts[0]:
            state = {key: _my_experts([part[name][key] for part in parts], parameter) for key in parts[0][name]}
        else:
            state = saved["state"][name]
        with torch.no_grad():
            parameter.copy_(state.pop("value"))
        if optimizer is not None:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    buffers = dict(model.named_buffers())
    for name, value in saved["buffers"].items():
        buffers[name].copy_(value)
    return saved


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[State, State]:
    """Value and optimizer state of every parameter, split into routed experts and everything else."""
    experts: State = {}
    shared: State = {}
    for name, parameter in model.named_parameters():
        state = {"value": parameter.detach(), **optimizer.state[parameter]}
        (experts if ".mlp.experts." in name else shared)[name] = state
    return experts, shared


def _my_experts(pieces: list[Any], parameter: nn.Parameter) -> Any:
    """This rank's experts out of those of all ranks that saved; scalars are the same in every piece."""
    if pieces[0].dim() == 0:
        return pieces[0]
    whole = torch.cat(pieces)
    first = parallel_state.get_expert_model_parallel_rank() * parameter.shape[0]
    return whole[first : first + parameter.shape[0]]


def _check_model(folder: Path, header: dict[str, Any], config: Config) -> None:
    ours, theirs = (dict(_model_keys(mapping)) for mapping in (config_to_dict(config), header["config"]))
    for path, value in ours.items():
        if value != theirs.get(path):
            raise ConfigError(
                f"{path} = {format_value(value)}: the checkpoint {folder} has {format_value(theirs.get(path))}"
            )


def _model_keys(mapping: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Paths and values of the keys that a checkpoint and a configuration must share."""
    below = [(section, mapping[section]) for section in ("model", "moe")]
    while below:
        path, value = below.pop(0)
        if isinstance(value, dict):
            below += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif path not in _NOT_THE_MODEL:
            yield path, value


def _folder(config: Config, step: int) -> Path:
    return Path(config.training.output_dir) / f"step_{step:08d}"
