"""RMS norms: of hidden states, together with the addition before them; of query and key heads."""

import torch
from torch import Tensor

from baton_kernels import reference
from gpu_worker.layers import ops
from gpu_worker.layers.linear import Linear
from gpu_worker.layers.parts import Layer, Parts


class RMSNorm(Layer):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = torch.empty(size)
        self.eps = eps

    def parts(self) -> Parts:
        return {"weight": self.weight}

    def fold(self, product: Linear) -> None:
        """The product that follows takes the weight in: of the norm, only the division by rms is left."""
        product.weight.mul_(self.weight)
        self.weight.fill_(1.0)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); without a residual, x is the sum."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class QKNormRope(Layer):
    """Norm of every query and key head, then rotary embedding; queries leave it scaled for attention."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, eps: float) -> None:
        self.q = torch.empty(head_dim)
        self.k = torch.empty(head_dim)
        self.counts = (heads, kv_heads)
        self.eps = eps
        self.weight = torch.empty(0)

    def parts(self) -> Parts:
        return {"q_norm.weight": self.q, "k_norm.weight": self.k}

    def prepare(self) -> None:
        heads, kv_heads = self.counts
        q = self.q.float() * len(self.q) ** -0.5
        self.weight = torch.cat((q.expand(heads, -1), self.k.float().expand(kv_heads, -1)))

    def __call__(self, qkv: Tensor, rotary: Tensor) -> None:
        """Changes the query and key heads of `qkv` [rows, heads + 2 · kv_heads, head_dim] in place."""
        reference.qk_norm_rope(qkv, self.weight, self.eps, rotary)
