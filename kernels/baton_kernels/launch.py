"""What every launch asks first: is this the interpreter, and what machine is it?

Knows nothing of any kernel.
"""

import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# The interpreter computes products of bf16 wrongly, so kernels widen them there; what only a GPU has
# (dependent launch) is left out. A constexpr, for kernels read it as a global.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

MIN_CAPABILITY = 80
_INTERPRETER = (90, 4)  # compiled for nothing; a few programs keep tests quick


@cache
def _cuda(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def machine(device: torch.device) -> tuple[int, int]:
    """(compute capability · 10, multiprocessors). `ValueError` below MIN_CAPABILITY."""
    if device.type != "cuda":
        return _INTERPRETER
    index = torch.cuda.current_device() if device.index is None else device.index
    capability, processors = _cuda(index)
    if capability < MIN_CAPABILITY:
        needed = MIN_CAPABILITY / 10
        raise ValueError(f"compute capability {capability / 10} of {device}, at least {needed} is needed")
    return capability, processors


def has_bulk(capability: int) -> bool:
    """Whether there are a bulk copy engine and the shared memory of a data centre's card for its tiles."""
    return 90 <= capability < 120


def dependent(pdl: bool, device: torch.device) -> bool:
    """Whether a launch that asks for programmatic dependent launch gets it: on 9.0 and later."""
    return pdl and device.type == "cuda" and machine(device)[0] >= 90


def describable(lines: Tensor) -> bool:
    """Whether the bulk copy engine can read tiles of `lines` [lines, columns]: it counts in 16 bytes."""
    stride = lines.stride(0) * lines.itemsize
    return stride % 16 == 0 and lines.data_ptr() % 16 == 0


def describe(lines: Tensor, height: int, width: int) -> TensorDescriptor:
    """`lines` for the bulk copy engine, which brings tiles of so many lines and columns."""
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [height, width])


@triton.jit
def let_downstream(PDL: tl.constexpr):
    """Lets the next kernel be launched: the sooner, the more it can do before it waits."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_upstream(PDL: tl.constexpr):
    """Waits until all that earlier kernels wrote can be read.

    Every program of a chain launched dependently calls this before it reads or writes what others touch: then
    a kernel that is through has all its forerunners through as well.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def ask_ahead(source_ptr, stride, lines, size):
    """Asks for the first `size` numbers of lines so far apart to come into the cache, from 9.0 on.

    A hint, to be given before the wait: in that cache all writes meet, so it is right even for what an
    earlier kernel still writes. At most as many lines as a program has threads; `size` and `stride` in bytes
    are multiples of 16.
    """
    itemsize: tl.constexpr = source_ptr.dtype.element_ty.primitive_bitwidth // 8
    line = tl.arange(0, tl.extra.cuda.num_threads())
    tl.inline_asm_elementwise(
        "{ .reg .pred wanted; setp.lt.s32 wanted, $2, $3;"
        " @wanted cp.async.bulk.prefetch.L2.global [$1], $4; mov.b32 $0, 0; }",
        "=r,l,r,r,r",
        [(source_ptr + line.to(tl.int64) * stride).to(tl.int64), line, lines, size * itemsize],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
