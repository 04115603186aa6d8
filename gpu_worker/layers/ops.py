"""Row-wise operations by device: our Triton kernels on CUDA, the reference elsewhere."""

from functools import cache
from types import ModuleType

from torch import Tensor

from baton_kernels import reference


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """Imported when first needed: without a CUDA device triton need not be there."""
    from baton_kernels import rms_norm, silu_mul

    return rms_norm, silu_mul


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if x.is_cuda:
        out: Tensor = _kernels()[0].rms_norm(x, weight, eps)
        return out
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    if x.is_cuda:
        out: tuple[Tensor, Tensor] = _kernels()[0].add_rms_norm(x, residual, weight, eps)
        return out
    return reference.add_rms_norm(x, residual, weight, eps)


def silu_mul(x: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    if x.is_cuda:
        out: Tensor = _kernels()[1].silu_mul(x)
        return out
    return reference.silu_mul(x)
