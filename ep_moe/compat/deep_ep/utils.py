"""Where programs written for DeepEP look for its events."""

from ep_moe.compat.deep_ep.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
