"""What the model knows of attention, and what a backend gets to know of a step.

Knows nothing of plans, slots' other columns, or sampling.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gpu_worker.errors import ConfigError

if TYPE_CHECKING:
    from gpu_worker.layers.norm import QKNormRope

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of one rank."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one forward pass: one per decoding slot, then the chunks' tokens, one chunk after the other.

    Row i is position `positions[i]` of the sequence in slot `slots[i]`. Decodes come longest first.
    `chunks`: rows of each chunk, in order.
    """

    slots: Numbers  # [rows]
    positions: Numbers  # [rows]
    decodes: int
    chunks: tuple[int, ...]


class Attention(Protocol):
    """What a model needs of a backend, which owns the layout of the cache: nobody else looks into it."""

    blocks_multiple: int  # a block table is a multiple of so many blocks wide
    deterministic: bool  # a row's bits are its own, whatever else is in the step

    def cache(self, layers: int, blocks: int) -> Tensor:
        """A cache [layers, …] of `blocks` blocks."""

    def forward(self, qkv: Tensor, norm: "QKNormRope", layer: int, context: "Context") -> Tensor:
        """Merged projections [rows, (heads + 2 · kv_heads) · head_dim] → [rows, heads · head_dim].

        Norm and rotation of queries and keys, keys and values into the layer's cache, then attention.
        """


class HostAttention(Attention, Protocol):
    """A backend whose step is planned on the host; its cache has a null block of zeros after the others."""

    def is_exact(self) -> bool:
        """Self-test: whether a row's bits are its own here, whatever else is in the step."""

    def clear(self, cache: Tensor, blocks: Tensor) -> None:
        """These blocks are about to be written anew; what they held must not be felt."""

    def plan(self, batch: Batch, block_table: Tensor) -> Any:
        """Everything about the step that layers share. block_table: [slots, blocks]."""


@dataclass(frozen=True, slots=True)
class Context:
    """All that a model's forward pass needs besides tokens: passed down, never global."""

    attention: Attention
    cache: Tensor  # [layers, …]
    work: Any  # the backend's plan of this step
    rotary: Tensor  # [rows, 2, head_dim]


def choose(name: str, device: str) -> type[Any]:
    """The backend class called `name`, or the best one for `device` where it is `auto`.

    Raises `ConfigError`, saying why, where that backend cannot serve.
    """
    cuda = device.startswith("cuda")
    if name == "triton" or (name == "auto" and cuda):
        if not cuda:
            raise ConfigError(f"--attention-backend {name}: its kernels need a CUDA device, not {device}")
        from gpu_worker.attention.triton_backend import TritonAttention

        return TritonAttention
    if cuda:
        raise ConfigError(f"--attention-backend {name}: plans its steps on the host, for CPU only")
    from gpu_worker.attention.torch_backend import TorchAttention

    return TorchAttention
