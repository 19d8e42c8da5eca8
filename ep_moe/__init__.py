"""ep_moe: an expert-parallel Mixture-of-Experts layer for training and inference."""

from ep_moe.buffer import Buffer
from ep_moe.comm import PeerTimeoutError
from ep_moe.config import Config, ConfigError
from ep_moe.layer import EPMoELayer

__all__ = ["Buffer", "Config", "ConfigError", "EPMoELayer", "PeerTimeoutError"]
