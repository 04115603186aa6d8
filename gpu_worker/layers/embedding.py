"""The token embedding."""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from gpu_worker.layers.parts import Layer, Parts


class Embedding(Layer):
    """Rows of a table by token id."""

    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, size), requires_grad=False)

    def parts(self) -> Parts:
        return {"weight": self.weight.data}

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)
