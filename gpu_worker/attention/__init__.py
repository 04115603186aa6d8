"""Attention behind one small interface: a backend plans a step once and then serves every layer with it."""

from gpu_worker.attention.choice import Case, choose
from gpu_worker.attention.interface import (
    Attention,
    AttentionShape,
    Batch,
    Context,
    DeviceAttention,
    HostAttention,
)

__all__ = [
    "Attention",
    "AttentionShape",
    "Batch",
    "Case",
    "Context",
    "DeviceAttention",
    "HostAttention",
    "choose",
]
