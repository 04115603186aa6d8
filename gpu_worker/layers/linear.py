"""Linear layers, merged where projections share their input.

On CPU large weights are kept in oneDNN's blocked layout: twice the speed of the plain one on AMD processors,
and a few rows cost little more than one. Rows' bits do not depend on the number of rows beyond a multiple
that `exactness` finds out.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from baton_kernels.reference import RmsOf
from gpu_worker.layers import ops
from gpu_worker.layers.parts import Layer, Parts

_packed_linear = torch.ops.mkldnn._linear_pointwise.default

_PACK_FROM = 60_000  # weights; below, the blocked layout saves less than its call costs


class Linear(Layer):
    """y = x · weightᵀ + bias for x [rows, inputs]; outputs are those of the named projections, in order.

    Tensor parallel will split each projection's outputs (or, for the closing one of a block, the inputs).
    """

    def __init__(self, inputs: int, projections: dict[str, int], bias: bool = False) -> None:
        self.projections = projections
        self.shape = (sum(projections.values()), inputs)
        self.weight = torch.empty(self.shape)
        self.bias = torch.empty(self.shape[0]) if bias else None
        self.dtype = self.weight.dtype
        self._packed: Tensor | None = None
        self._invariant = False

    def parts(self) -> Parts:
        sizes, names = list(self.projections.values()), list(self.projections)
        parts = dict(zip((f"{n}.weight" for n in names), self.weight.split(sizes), strict=True))
        if self.bias is not None:
            parts |= dict(zip((f"{n}.bias" for n in names), self.bias.split(sizes), strict=True))
        return parts

    def fix_rows(self) -> None:
        self._invariant = self.weight.is_cuda  # on CPU `exactness` finds out how many rows are alike

    def prepare(self) -> None:
        if self.weight.is_cpu and self.weight.numel() >= _PACK_FROM and torch.backends.mkldnn.is_available():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
            self.weight = self.weight.new_empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if self._reads_rows(x):
            return ops.product(x, self.weight)
        if self._is_ours(x):
            return ops.invariant_product(x, self.weight, self.bias, None)
        if self._packed is None:
            return linear(x, self.weight, self.bias)
        product: Tensor = _packed_linear(x, self._packed, self.bias, "none", [], "")
        return product

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """y + residual, rounded once where it can be; it may take the place of `residual`."""
        if self._reads_rows(x):
            return ops.product(x, self.weight, residual=residual)
        if not self._invariant and self.bias is None and ops.narrow(x, self.weight):
            return ops.narrow_product(x, self.weight, residual)
        if self._is_ours(x):
            return ops.invariant_product(x, self.weight, self.bias, residual)
        if self._packed is None and self.bias is None and not ops.adds_apart(x, self.weight):
            return residual.addmm_(x, self.weight.T)
        return residual.add_(self(x))

    def add_gated(self, gate_up: Tensor, rms_of: RmsOf, residual: Tensor) -> Tensor:
        """`add` of silu(gate) · up, both first divided by the rms of `rms_of`."""
        if self._reads_rows(gate_up):
            return ops.product(gate_up, self.weight, silu=True, rms_of=rms_of, residual=residual)
        return self.add(ops.silu_mul(gate_up, rms_of), residual)

    def _reads_rows(self, x: Tensor) -> bool:
        return ops.few(x) and not self._invariant and self.bias is None

    def _is_ours(self, x: Tensor) -> bool:
        return self._invariant or ops.some(x, self.weight)


class Head(Linear):
    """The projection on the vocabulary; `tied` to the embedding's weight, or with one of its own."""

    def __init__(self, inputs: int, vocabulary: int, tied: Tensor | None) -> None:
        super().__init__(inputs, {"lm_head": 0 if tied is not None else vocabulary})
        self.tied = tied is not None
        self.shape = (vocabulary, inputs)
        if tied is not None:
            self.weight = tied

    def parts(self) -> Parts:
        return {} if self.tied else super().parts()
