"""How the configuration becomes a communicator."""

from __future__ import annotations

import torch.distributed as dist

from ep_moe.comm.communicator import Communicator
from ep_moe.comm.portable import PortableCommunicator
from ep_moe.config import ConfigError


def build_communicator(comm: str, group: dist.ProcessGroup | None) -> Communicator:
    """The communicator that ``moe.comm`` asks for, over ``group`` (the default group if ``None``).

    Raises:
        ConfigError: if ``torch.distributed`` has not been initialised.
    """
    if not dist.is_initialized():
        raise ConfigError(
            f"moe.comm = {comm}: needs torch.distributed; call torch.distributed.init_process_group first "
            "(torchrun sets the environment it reads)"
        )
    world = dist.group.WORLD
    assert world is not None
    return PortableCommunicator(group if group is not None else world)
