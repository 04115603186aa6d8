"""What the model knows of attention, and what a backend gets to know of a step.

Knows nothing of plans, slots' other columns, or sampling.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from baton_kernels.reference import RmsOf

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
    `chunks`: rows of each chunk, in order. `written`: rows whose keys and values go into the cache; those of
    the others are there already.
    """

    slots: Numbers  # [rows]
    positions: Numbers  # [rows]
    decodes: int
    chunks: tuple[int, ...]
    written: Numbers | None = None  # ascending; None: all


class Attention(Protocol):
    """What a model needs of a backend, which owns the layout of the cache: nobody else looks into it."""

    blocks_multiple: int  # a block table is a multiple of so many blocks wide

    def cache(self, layers: int, blocks: int) -> Tensor:
        """A cache [layers, …] of `blocks` blocks."""

    def forward(
        self,
        qkv: Tensor,
        norm: "QKNormRope",
        layer: int,
        context: "Context",
        rms_of: RmsOf | None = None,
    ) -> Tensor:
        """Merged projections [rows, (heads + 2 · kv_heads) · head_dim] → [rows, heads · head_dim].

        Division by the rms of other rows, if asked for; norm and rotation of queries and keys; keys and
        values into the layer's cache; then attention.
        """


class HostAttention(Attention, Protocol):
    """A backend whose step is planned on the host; its cache has a null block of zeros after the others."""

    def is_exact(self) -> bool:
        """Self-test: whether a row's bits are its own here, whatever else is in the step."""

    def clear(self, cache: Tensor, blocks: Tensor) -> None:
        """These blocks are about to be written anew; what they held must not be felt."""

    def plan(self, batch: Batch, block_table: Tensor) -> Any:
        """Everything about the step that layers share. block_table: [slots, blocks]."""


class Tiler(Protocol):
    """How the host lists prompt chunks for a backend."""

    @property
    def height(self) -> int:
        """Rows that an item has at most."""

    @property
    def most_split(self) -> int:
        """Up to so many items may be split into parts, which need room."""

    def cut(
        self, slot: Numbers, first: Numbers, rows: Numbers, start: Numbers, *, split: bool = True
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(items, splits) of chunks of `rows` rows from row `first` on, positions `start` … in `slot`."""


class DecodeSpace(Protocol):
    """What a backend keeps for decode steps; these two are written before a step is planned."""

    @property
    def seen(self) -> Tensor:
        """int32 [rows]: positions that a row sees, its own among them; 0 for a row that is masked."""

    @property
    def slots(self) -> Tensor:
        """int32 [rows]: whose row it is, -1 for nobody's."""


class DeviceAttention(Attention, Protocol):
    """A backend whose steps are planned on the device, in captured graphs, from rows that it reads there."""

    deterministic: bool  # a row's bits are its own, whatever else is in the step

    @property
    def tiling(self) -> Tiler:
        """How the host is to list prompt chunks."""

    def decode_space(self, rows: int, max_length: int) -> Any:
        """`DecodeSpace` for so many rows of up to `max_length` positions."""

    def plan_decode(self, space: Any, rows: int, block_table: Tensor) -> Any:
        """What layers share of a step over the first `rows` of `space`; block_table: int32 [slots, blocks]"""

    def plan_prompts(self, items: Tensor, splits: Tensor, block_table: Tensor) -> Any:
        """What layers share of a pass over chunks, which `tiling` listed."""


@dataclass(frozen=True, slots=True)
class Context:
    """All that a model's forward pass needs besides tokens: passed down, never global."""

    attention: Attention
    cache: Tensor  # [layers, …]
    work: Any  # the backend's plan of this step
    rotary: Tensor  # [rows, 2, head_dim]
    picked: Tensor | None = None  # int32 [picks]: only these rows' hidden states are wanted
