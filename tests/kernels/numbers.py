"""Random tensors for kernels, and how far a result is from float64."""

import os

import torch

# The interpreter cuts bf16 off where a GPU rounds to the nearest.
_BF16 = 2e-2 if os.environ.get("TRITON_INTERPRET") == "1" else 6e-3
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: _BF16}
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, device=device).to(dtype)


def poison(tensor):
    """The tensor filled with NaN: what a kernel does not write shows."""
    return tensor.fill_(torch.nan)


def close(actual, expected, bound=None):
    """Whether the relative error in the Euclidean norm is within the bound of the dtype; never with a NaN."""
    error = (actual.double() - expected).norm() / expected.norm()
    limit = BOUNDS[actual.dtype] if bound is None else bound
    if not bool(error <= limit):
        print(f"relative error {error:.2e}, bound {limit:.0e}")
        return False
    return True
