"""What every kernel computes, in torch operations: the CPU path, and the twin each kernel is tested against.

All functions give a row the same bits whatever other rows are in the batch, as long as matrix products do.
So they avoid operations whose vector and scalar parts round differently on CPU (silu, sigmoid, log1p, fused
multiply-add) and sums over a whole tensor; exp, log, sqrt and sums over the innermost dimension are safe.
"""

from baton_kernels.reference.attention import CHUNK, Partial, attend, fold
from baton_kernels.reference.layers import (
    TURNS,
    RmsOf,
    add_rms_norm,
    in_turns,
    over_rms,
    qk_norm_rope,
    rms_norm,
    rotary_table,
    silu_mul,
    write_kv,
)
from baton_kernels.reference.sampling import SamplingRows, exponential, sample
from baton_kernels.reference.step import end_reasons, state_hash

__all__ = [
    "CHUNK",
    "TURNS",
    "Partial",
    "RmsOf",
    "SamplingRows",
    "add_rms_norm",
    "attend",
    "end_reasons",
    "exponential",
    "fold",
    "in_turns",
    "over_rms",
    "qk_norm_rope",
    "rms_norm",
    "rotary_table",
    "sample",
    "silu_mul",
    "state_hash",
    "write_kv",
]
