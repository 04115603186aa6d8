"""Tile sizes per architecture: one static table, measured once; nothing is tuned at run time.

Keys are compute capability · 10; an architecture that is not listed uses the nearest older one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Decode attention: keys per iteration, warps, pipeline stages, programs per multiprocessor.

    `described`: keys and values by the bulk copy engine, where a cache block holds whole iterations.
    """

    keys: int
    warps: int
    stages: int
    programs: int
    described: bool = False


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Prefill attention: query rows · heads of a tile, keys per iteration, warps, pipeline stages.

    `described`: keys and values by the bulk copy engine, where a cache block holds whole iterations.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    described: bool = False


@dataclass(frozen=True, slots=True)
class Tiles:
    """All of one architecture."""

    decode: DecodeTile
    decode_few: DecodeTile  # for steps of a few rows
    prefill: PrefillTile
    prefill_wide: PrefillTile  # for heads wider than 128


_TABLE = {
    80: Tiles(
        DecodeTile(64, 4, 3, 2),
        DecodeTile(64, 4, 3, 2),
        PrefillTile(128, 64, 8, 2),
        PrefillTile(64, 32, 4, 2),
    ),
    # 100 KiB of shared memory per multiprocessor instead of 164 and more
    86: Tiles(
        DecodeTile(32, 4, 3, 2),
        DecodeTile(32, 4, 3, 2),
        PrefillTile(128, 32, 8, 2),
        PrefillTile(64, 32, 4, 1),
    ),
    89: Tiles(
        DecodeTile(32, 4, 3, 2),
        DecodeTile(32, 4, 3, 2),
        PrefillTile(128, 32, 8, 2),
        PrefillTile(64, 32, 4, 1),
    ),
    90: Tiles(
        DecodeTile(64, 4, 3, 3),
        DecodeTile(64, 4, 3, 3),
        PrefillTile(128, 64, 8, 3, True),
        PrefillTile(64, 64, 4, 2, True),
    ),
}


def tiles(capability: int) -> Tiles:
    """Those of the newest listed architecture that is not newer than `capability` (at least 80)."""
    return _TABLE[max(key for key in _TABLE if key <= capability)]
