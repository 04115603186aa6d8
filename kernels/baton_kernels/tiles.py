"""Tile sizes per architecture: one static table, measured once; nothing is tuned at run time.

Keys are compute capability · 10; an architecture that is not listed uses the nearest older one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Decode attention: keys of a tile, warps, pipeline stages, programs per multiprocessor.

    `described`: keys and values by the bulk copy engine, where a cache block holds whole tiles.
    `most_rows`: of steps that it is for, None for any.
    """

    keys: int
    warps: int
    stages: int
    programs: int
    described: bool = False
    most_rows: int | None = None


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Prefill attention: query rows · heads of a tile, keys per iteration, warps, pipeline stages.

    `described`: keys and values by the bulk copy engine, where a cache block holds whole iterations.
    `registers`: of a thread at most, so that two programs share a multiprocessor.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    described: bool = False
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Tiles:
    """All of one architecture. `bulk`: in order of preference, where a cache block holds whole tiles.

    Of `decode_bulk` the last is for any number of rows.
    """

    decode: DecodeTile
    decode_wide: DecodeTile  # for heads wider than 128
    prefill: PrefillTile
    prefill_wide: PrefillTile  # for heads wider than 128
    decode_bulk: tuple[DecodeTile, ...] = ()
    prefill_bulk: tuple[PrefillTile, ...] = ()

    def decode_for(self, block_size: int, head_dim: int) -> tuple[DecodeTile, ...]:
        """For a cache of such blocks and heads, by the number of rows; the last for any."""
        if head_dim > 128:
            return (self.decode_wide,)
        fit = tuple(tile for tile in self.decode_bulk if block_size % tile.keys == 0)
        return fit or (self.decode,)

    def prefill_for(self, block_size: int, head_dim: int) -> PrefillTile:
        """For prompt chunks."""
        if head_dim > 128:
            return self.prefill_wide
        return next((tile for tile in self.prefill_bulk if block_size % tile.keys == 0), self.prefill)


_SMALL_SHARED_MEMORY = Tiles(  # 100 KiB of it per multiprocessor instead of 164 and more
    decode=DecodeTile(32, 4, 4, 3),
    decode_wide=DecodeTile(32, 8, 3, 1),
    prefill=PrefillTile(128, 32, 8, 2),
    prefill_wide=PrefillTile(64, 32, 8, 1),
)

_TABLE = {
    80: Tiles(
        decode=DecodeTile(64, 4, 4, 3),
        decode_wide=DecodeTile(32, 8, 3, 1),
        prefill=PrefillTile(128, 64, 8, 2),
        prefill_wide=PrefillTile(64, 32, 8, 2),
    ),
    86: _SMALL_SHARED_MEMORY,
    89: _SMALL_SHARED_MEMORY,
    90: Tiles(  # measured on an H200, see bench/results
        decode=DecodeTile(64, 2, 3, 4),
        decode_wide=DecodeTile(32, 4, 3, 2),
        prefill=PrefillTile(128, 128, 8, 2),
        prefill_wide=PrefillTile(64, 32, 8, 2),
        # H100, 256 rows of 233 positions, launched as usual and early: 96 and 103 us against 90 and 89, since
        # with many small programs it matters less on which multiprocessors early ones find room
        decode_bulk=(DecodeTile(32, 2, 5, 4, True, most_rows=64), DecodeTile(16, 1, 5, 8, True)),
        prefill_bulk=(PrefillTile(128, 64, 8, 2, described=True, registers=128),),
    ),
}


def tiles(capability: int) -> Tiles:
    """Those of the newest listed architecture that is not newer than `capability` (at least 80)."""
    return _TABLE[max(key for key in _TABLE if key <= capability)]
