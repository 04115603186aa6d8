"""The state hash: one 64-bit number that both ends compute from the slot table after every step.

The hash of a table is the sum modulo 2^64 over its occupied slots of a mixed word per slot, so neither
order nor vector width matters and a kernel can reduce it in any shape. Mixing is the finaliser of
splitmix64 (Steele, Lea, Flood 2014) over a linear combination with odd constants.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from baton_wire.columns import Column


class Occupancy(IntEnum):
    """What a slot is doing after a step."""

    FREE = 0  # never admitted, released, or ended; not hashed
    PREFILL = 1  # its prompt is not computed to the end; last token is -1
    DECODE = 2


_SLOT, _ADMITTED, _LENGTH, _OCCUPANCY, _TOKEN = (
    np.uint64(k)
    for k in (
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD6E8FEB86659FD93,
        0xA0761D6478BD642F,
    )
)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def state_hash(
    slots: Column,
    admitted: Column,
    length: Column,
    occupancy: Column,
    last_token: Column,
) -> int:
    """Hash of the occupied slots given, one row each.

    slots: slot numbers; admitted: step of the slot's latest admission; length: positions in the cache;
    occupancy: `Occupancy`, rows that are FREE must be left out; last_token: last sampled id, -1 for none.
    Any integer dtypes; shapes [n] all.
    """
    word: NDArray[np.uint64] = slots.astype(np.uint64) * _SLOT
    word += admitted.astype(np.uint64) * _ADMITTED
    word += length.astype(np.uint64) * _LENGTH
    word += occupancy.astype(np.uint64) * _OCCUPANCY
    word += (last_token.astype(np.int64) + 1).astype(np.uint64) * _TOKEN
    word ^= word >> _S30
    word *= _MIX_1
    word ^= word >> _S27
    word *= _MIX_2
    word ^= word >> _S31
    return int(word.sum(dtype=np.uint64))
