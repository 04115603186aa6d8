"""silu(gate) · up of the merged projection's output. Twin: `reference.silu_mul`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import dependent, wait_upstream

_BLOCK = 1024


@triton.jit
def silu_mul_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program (row, block of columns). x: [rows, 2 · size], out: [rows, size], both contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    wait_upstream(PDL)
    gate = tl.load(x_ptr + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * size + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(x: Tensor, *, out: Tensor | None = None, pdl: bool = False) -> Tensor:
    """[rows, 2 · size] → [rows, size], computed in float32 and rounded once."""
    rows, size = x.shape[0], x.shape[1] // 2
    assert x.is_contiguous()
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device) if out is None else out
    pdl = dependent(pdl, x.device)
    silu_mul_kernel[(rows, triton.cdiv(size, _BLOCK))](
        x, out, size, BLOCK=_BLOCK, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {})
    )
    return out
