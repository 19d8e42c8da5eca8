"""Dispatchers: routing decisions to expert-major rows and back, with autograd."""

from ep_moe.dispatcher.dispatcher import DispatchedTokens, TokenDispatcher
from ep_moe.dispatcher.factory import ExchangeShape, build_dispatcher
from ep_moe.dispatcher.normal import NormalDispatcher

__all__ = ["DispatchedTokens", "ExchangeShape", "NormalDispatcher", "TokenDispatcher", "build_dispatcher"]
