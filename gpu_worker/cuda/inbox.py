"""What the host tells the device for one step: written into pinned memory, sent by one copy.

A page of the ring must not be written before its last copy is through: the runner gives a page out again only
when the step that had it has been picked up.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED_WORDS = 4  # sections begin at multiples of this: kernels tell aligned pointers from others


def aligned(words: int) -> int:
    """The next place where a section may begin."""
    return -(-words // ALIGNED_WORDS) * ALIGNED_WORDS


class Inbox:
    """One page on the device, at an address that never changes, and a ring of pages on the host."""

    def __init__(self, words: int, ring: int, device: torch.device) -> None:
        self.words = torch.zeros(aligned(words), dtype=torch.int32, device=device)
        size = (ring, len(self.words))
        self._pages = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._numbers: NDArray[np.int32] = self._pages.numpy()

    def page(self, place: int) -> NDArray[np.int32]:
        """The host's page `place`, to be written."""
        page: NDArray[np.int32] = self._numbers[place]
        return page

    def send(self, place: int, words: int) -> None:
        """Queues the copy of the page's first words."""
        self.words[:words].copy_(self._pages[place, :words], non_blocking=True)


def send(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """What is too rare or too large for a page, as a tensor of its own; does not wait either."""
    host = torch.from_numpy(values)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
