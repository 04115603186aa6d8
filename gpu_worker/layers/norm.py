"""RMS norm, alone or together with the addition before it."""

import torch
from torch import Tensor, nn

from baton_kernels import reference
from gpu_worker.layers.parts import Layer, Parts


class RMSNorm(Layer):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def parts(self) -> Parts:
        return {"weight": self.weight.data}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); without a residual, x is the sum."""
        if residual is None:
            return reference.rms_norm(x, self.weight, self.eps), x
        return reference.add_rms_norm(x, residual, self.weight, self.eps)
