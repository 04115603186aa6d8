"""RMSNorm of rows, alone or with the addition before it. Twins: `reference.rms_norm`, `add_rms_norm`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import dependent, let_downstream, wait_upstream


@triton.jit
def inverse_rms(x_ptr, row, stride, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """1 / rms of a row, float32."""
    column = tl.arange(0, PADDED)
    x = tl.load(x_ptr + row * stride + column, mask=column < SIZE, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    x_stride,
    size,
    eps,
    ADD: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program, one row. `residual`, `total` and `out` are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < size
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    let_downstream(PDL)
    wait_upstream(PDL)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if ADD:
        x += tl.load(residual_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
        tl.store(total_ptr + row * size + column, x.to(dtype), mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(out_ptr + row * size + column, (weight * x * scale).to(dtype), mask=inside)


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, total: Tensor, add: bool, pdl: bool
) -> None:
    rows, size = x.shape
    padded = triton.next_power_of_2(size)
    pdl = dependent(pdl, x.device)
    rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        total,
        x.stride(0),
        size,
        eps,
        ADD=add,
        PADDED=padded,
        PDL=pdl,
        num_warps=min(max(padded // 512, 1), 16),
        **({"launch_pdl": True} if pdl else {}),
    )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """x / rms(x) · weight for x [rows, size], whose rows may be strided; `out` contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _launch(x, x, weight, eps, out, out, False, pdl)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum) for x, residual [rows, size]. The sum takes the place of `residual`."""
    assert residual.is_contiguous()
    out = torch.empty_like(residual)
    _launch(x, residual, weight, eps, out, residual, True, pdl)
    return out, residual
