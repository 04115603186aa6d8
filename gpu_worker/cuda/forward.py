"""The model over one cache and one slot table: what every kind of pass does, whatever its rows are."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from baton_kernels import sampler
from baton_kernels.sampler import SampleWork
from gpu_worker.attention.interface import Context, DeviceAttention
from gpu_worker.attention.triton_backend import Rows
from gpu_worker.models import Model
from gpu_worker.slots import SlotTable

Pool = Any  # where captured passes find their memory: `torch.cuda.graph_pool_handle()`


@dataclass(frozen=True, slots=True)
class Forward:
    """Hidden states of rows, and tokens from hidden states."""

    model: Model
    attention: DeviceAttention
    cache: Tensor
    rotary: Tensor
    table: SlotTable
    sampling: SampleWork
    sampled: Tensor  # int32 [slots], the token of each slot that a step sampled for

    def __call__(self, tokens: Tensor, rows: Rows, picked: Tensor | None = None) -> Tensor:
        """[rows, hidden], or [picks, hidden]; keys and values of all rows are in the cache after it."""
        return self.model(tokens, Context(self.attention, self.cache, rows, self.rotary, picked))

    def sample(
        self,
        hidden: Tensor,
        slots: Tensor,
        allowed: Tensor | None = None,
        mask_rows: Tensor | None = None,
    ) -> None:
        """One token for each row's slot into `sampled`; see `baton_kernels.sampler.sample`."""
        logits = self.model.logits(hidden)
        sampler.sample(
            logits, slots, self.table, self.sampling, self.sampled, allowed=allowed, mask_rows=mask_rows
        )
