"""The sampler's random numbers on the device: the integers of `reference.sampling`, noise in float32.

The reference turns 52 bits into u in (0, 1) and E = -log(u) in float64. Here the shorter side is kept: for u
above one half E = -log1p(-v) of v = 1 - u, whose bits are the complement, so that E is right to a few units
in the last place of float32 from 1e-16 to 36.7 and neither tail is cut. Scores agree with the reference's to
about 4e-6: tokens nearer to each other than that may change places, a few in a million.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from baton_kernels.launch import INTERPRETED

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_DROPPED_BITS = tl.constexpr(12)
_LARGEST = tl.constexpr((1 << 52) - 1)
_UNIT = tl.constexpr(2.0**-52)
_SERIES_BELOW = tl.constexpr(0.125)  # above, log's error of 2^-22 is small against its result


@triton.jit
def _mix(word):
    """SplitMix64's finaliser, uint64."""
    word = (word ^ (word >> 30)) * _MIX_1
    word = (word ^ (word >> 27)) * _MIX_2
    return word ^ (word >> 31)


@triton.jit
def noise_key(seed, position):
    """Key of a row's noise: uint64 from the seed's bits (int64) and the position of the token to come."""
    seed = seed.to(tl.uint64, bitcast=True)
    return _mix(_mix(seed + _GOLDEN) + (position + 1).to(tl.uint64) * _GOLDEN)


@triton.jit
def exponential(key, ids):
    """Exponential noise, float32, of token ids (int32) under a row's key; its -log is Gumbel noise."""
    bits = (_mix(key + (ids + 1).to(tl.uint64) * _GOLDEN) >> _DROPPED_BITS).to(tl.int64)
    complement = _LARGEST - bits
    small = bits > complement  # u above one half
    side = (tl.minimum(bits, complement).to(tl.float32) + 0.5) * _UNIT  # u, or v = 1 - u
    series = 1.0 / 9
    for n in tl.static_range(8, 0, -1):
        series = series * side + 1.0 / n
    argument = tl.where(small, 1.0 - side, side)
    logarithm = tl.log(argument) if INTERPRETED else libdevice.fast_logf(argument)
    return tl.where(small & (side < _SERIES_BELOW), series * side, -logarithm)
