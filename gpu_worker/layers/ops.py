"""Operations by device: our Triton kernels on CUDA, the reference elsewhere."""

from functools import cache
from typing import Any

from torch import Tensor

from baton_kernels import reference
from baton_kernels.reference import RmsOf

# Up to so many rows, on CUDA, products that read weights row by row beat cuBLAS (H200, Qwen3-0.6B: 1 row 0.89
# against 1.55 ms a token, 4 rows 1.50 against 1.42).
FEW_ROWS = 2
# Up to so many rows our products by matrix instructions do, which are launched early; where they add to a
# residual, up to more if weights are small. H100, µs, ours launched early against the library's. Qwen3-0.6B:
# 64 rows: qkv 4.7, 5.9, out 4.5, 7.5, gate and up with the activation 7.5, 9.0, down 5.6, 8.6; 256 rows: 6.1,
# 6.7, 5.5, 7.9, 10.9, 10.1, 7.6, 10.4; 1,024 rows: 14.2, 14.4, 9.7, 12.2, 26.4, 26.6, 13.5, 15.8. Qwen3-8B,
# all of a layer: 16 rows 144, 159, 64 rows 154, 167, 128 rows 166, 171, 256 rows 199, 197.
SOME_ROWS = 128
ADDED_ROWS = 1024
SOME_ROWS_WITHOUT_BULK = 16  # without the bulk copy engine, and of small weights alone; not measured there
SMALL_WEIGHT = 1 << 23
# Up to so many rows, where a small weight has few outputs, another kernel of ours is better still: all of the
# weight is on its way before x is there (H100, 8 rows, µs with the addition, this, the above, the library's:
# out 4.1, 6.1, 5.9, down 4.8, 8.2, 7.2; products with many outputs, as qkv, lose by it).
NARROW_ROWS = 16
# Up to so many rows our product of gate and up does the activation that follows, where these take turns.
GATED_ROWS = 128
# From so many rows on, of larger weights, cuBLAS takes longer to add to a residual than an addition by itself
# does (H200, Qwen3-8B, 8,192 rows, µs: out 402 against 350 + 48, down 1,157 against 1,027 + 48).
MANY_ROWS = 2048
# Whether our kernels are launched before those they depend on are through. Qwen3-0.6B, ms: H100, in a tree
# between, 256 rows 4.49 for 4.57, a prompt of 8,000 tokens 29.5 for 30.4, a known one 3.1 for 3.7; H200, one
# row 0.89 for 1.07.
EARLY = True


@cache
def _kernels() -> Any:
    """Imported when first needed: without a CUDA device triton need not be there."""
    import baton_kernels.invariant_linear
    import baton_kernels.launch
    import baton_kernels.linear
    import baton_kernels.narrow_linear
    import baton_kernels.rms_norm
    import baton_kernels.silu_mul

    return baton_kernels


def on_gpu(x: Tensor) -> bool:
    """Whether what is done with `x` is our kernels'; tests say so where these are interpreted."""
    return x.is_cuda


def few(x: Tensor) -> bool:
    """Whether products of `x` are best our own kernel's, with what stands before and after them."""
    return on_gpu(x) and x.shape[0] <= FEW_ROWS


def _are_few_enough(x: Tensor, weight: Tensor, most: int) -> bool:
    """Whether the rows of `x` are at most so many, or what is ours without the bulk copy engine."""
    if not on_gpu(x) or x.shape[0] > most:
        return False
    launch = _kernels().launch
    if launch.has_bulk(launch.machine(x.device)[0]):
        return True
    return x.shape[0] <= SOME_ROWS_WITHOUT_BULK and weight.numel() <= SMALL_WEIGHT


def some(x: Tensor, weight: Tensor) -> bool:
    """Whether products of `x` with `weight` are best our own by matrix instructions."""
    return _are_few_enough(x, weight, SOME_ROWS)


def some_added(x: Tensor, weight: Tensor) -> bool:
    """The same where they are added to a residual."""
    return _are_few_enough(x, weight, ADDED_ROWS if weight.numel() <= SMALL_WEIGHT else SOME_ROWS)


def narrow(x: Tensor, weight: Tensor) -> bool:
    """Whether products of `x` with `weight` are best those of a weight of few outputs."""
    if not on_gpu(x) or x.shape[0] > NARROW_ROWS or weight.numel() > SMALL_WEIGHT:
        return False
    served: bool = _kernels().narrow_linear.serves(weight)
    return served


def gates(x: Tensor) -> bool:
    """Whether the activation after a product of `x` with gate and up in turns is best in it."""
    return on_gpu(x) and x.shape[0] <= GATED_ROWS


def adds_apart(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of `x` is best added to a residual by an operation of its own."""
    return x.shape[0] >= MANY_ROWS and weight.numel() > SMALL_WEIGHT


def early(x: Tensor) -> bool:
    """Whether kernels over the rows of `x` are launched early."""
    return EARLY and on_gpu(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if on_gpu(x):
        out: Tensor = _kernels().rms_norm.rms_norm(x, weight, eps, pdl=early(x))
        return out
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    if on_gpu(x):
        norm = _kernels().rms_norm
        out: tuple[Tensor, Tensor] = norm.add_rms_norm(x, residual, weight, eps, pdl=early(x))
        return out
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(x: Tensor, turns: int = 0, rms_of: RmsOf | None = None) -> Tensor:
    """See `reference.silu_mul`; before it, if asked for, `reference.over_rms`."""
    if on_gpu(x):
        out: Tensor = _kernels().silu_mul.silu_mul(x, turns=turns, rms_of=rms_of, pdl=early(x))
        return out
    return reference.silu_mul(x if rms_of is None else reference.over_rms(x, rms_of), turns)


def product(
    x: Tensor,
    weight: Tensor,
    *,
    silu: bool = False,
    turns: int = 0,
    rms_of: RmsOf | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """before(x) · weightᵀ + residual in one kernel, for `few` rows; see `baton_kernels.linear.linear`."""
    linear = _kernels().linear.linear
    out: Tensor = linear(x, weight, silu=silu, turns=turns, rms_of=rms_of, residual=residual, pdl=early(x))
    return out


def narrow_product(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """x · weightᵀ + residual, which it may take the place of, for `narrow` products."""
    linear = _kernels().narrow_linear.narrow_linear
    out: Tensor = linear(x, weight, residual=residual, pdl=early(x))
    return out


def invariant_product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x · weightᵀ + bias + residual, a row's bits the same among any number; see `invariant_linear` there."""
    linear = _kernels().invariant_linear.invariant_linear
    out: Tensor = linear(x, weight, bias, residual=residual, pdl=early(x))
    return out


def gated_product(x: Tensor, weight: Tensor, turns: int, eps: float | None) -> Tensor:
    """silu(gate) · up of x, or with `eps` of x / rms(x), as an `invariant_product`."""
    linear = _kernels().invariant_linear.invariant_linear
    out: Tensor = linear(x, weight, turns=turns, eps=eps, pdl=early(x))
    return out
