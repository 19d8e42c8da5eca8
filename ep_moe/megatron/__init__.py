"""Megatron-Core adapter: our layer in the place of its ``MoELayer``."""

from ep_moe.megatron.experts import from_native, to_native
from ep_moe.megatron.layer import MegatronEPMoELayer
from ep_moe.megatron.spec import use_ep_moe

__all__ = ["MegatronEPMoELayer", "from_native", "to_native", "use_ep_moe"]
