"""The token embedding."""

import torch
from torch import Tensor

from gpu_worker.layers.parts import Layer, Parts


class Embedding(Layer):
    """Rows of a table by token id."""

    def __init__(self, vocabulary: int, size: int) -> None:
        self.weight = torch.empty(vocabulary, size)

    def parts(self) -> Parts:
        return {"weight": self.weight}

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.weight.index_select(0, tokens)
