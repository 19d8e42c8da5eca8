"""The public interface of DeepEP's first version over this library's core; ``docs/deep_ep.md`` says what differs."""

import torch

from ep_moe.compat.deep_ep.buffer import Buffer
from ep_moe.compat.deep_ep.config import Config
from ep_moe.compat.deep_ep.events import EventHandle, EventOverlap

topk_idx_t = torch.int64

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]
