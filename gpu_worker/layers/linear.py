"""Linear layers, merged where projections share their input.

On CPU large weights are kept in oneDNN's blocked layout: twice the speed of the plain one on AMD processors,
and a few rows cost little more than one. Rows' bits do not depend on the number of rows beyond a multiple
that `exactness` finds out.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from baton_kernels import reference
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
        self._invariant = ops.on_gpu(self.weight)  # on CPU `exactness` finds out how many rows are alike

    def prepare(self) -> None:
        if (
            not ops.on_gpu(self.weight)
            and self.weight.numel() >= _PACK_FROM
            and torch.backends.mkldnn.is_available()
        ):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
            self.weight = self.weight.new_empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if self._reads_rows(x):
            return ops.product(x, self.weight)
        if self._invariant or ops.some(x, self.weight):
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
        if self._invariant or ops.some_added(x, self.weight):
            return ops.invariant_product(x, self.weight, self.bias, residual)
        if self._packed is None and self.bias is None and not ops.adds_apart(x, self.weight):
            return residual.addmm_(x, self.weight.T)
        return residual.add_(self(x))

    def add_gated(self, gate_up: "GateUp", x: Tensor, eps: float) -> Tensor:
        """x + y of what `gate_up` makes of x / rms(x); it may take the place of x."""
        if self._reads_rows(x):
            return ops.product(
                gate_up(x), self.weight, silu=True, turns=gate_up.turns, rms_of=(x, eps), residual=x
            )
        return self.add(gate_up.activated(x, eps), x)

    def _reads_rows(self, x: Tensor) -> bool:
        return ops.few(x) and not self._invariant and self.bias is None


class GateUp(Linear):
    """Gate and up of a gated feed-forward, of `size` units each. On CUDA their outputs come in turns."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__(inputs, {"gate_proj": size, "up_proj": size})
        self.size = size
        self.turns = 0  # as in `reference.silu_mul`

    def takes_turns(self) -> bool:
        """Whether outputs are to come in turns: where matrix instructions of ours gain by it.

        Products with large weights gain little, and for a row or two would lose: reading in turns takes more
        registers than let as many programs run as before (128 a thread, 4,096 outputs of 12,288 inputs).
        """
        small = self.weight.numel() <= ops.SMALL_WEIGHT
        return ops.on_gpu(self.weight) and small and self.size % reference.TURNS == 0

    def prepare(self) -> None:
        if self.takes_turns():
            # in place: others may hold it
            self.weight.copy_(reference.in_turns(self.weight, reference.TURNS))
            self.turns = reference.TURNS
        super().prepare()

    def activated(self, x: Tensor, eps: float | None = None) -> Tensor:
        """silu(gate) · up [rows, size] of x, or with `eps` of x / rms(x)."""
        if self.turns and (self._invariant or ops.gates(x)):
            return ops.gated_product(x, self.weight, self.turns, eps)
        return ops.silu_mul(self(x), self.turns, None if eps is None else (x, eps))


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
