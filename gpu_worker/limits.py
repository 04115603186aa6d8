"""What this worker can hold: the numbers it tells the core, which obeys them."""

import os
from dataclasses import dataclass
from pathlib import Path

from baton_wire.hello import longest_sequence
from gpu_worker.errors import ConfigError

_CPU_CACHE_BYTES = 2 << 30
_CPU_CACHE_SHARE = 0.5  # of the memory that is available when the cache is made


@dataclass(frozen=True, slots=True)
class Limits:
    """See `baton_wire.hello.WorkerHello`."""

    max_slots: int
    max_tokens_per_step: int
    max_model_len: int
    block_size: int
    num_blocks: int
    row_multiple: int

    @property
    def max_sequence(self) -> int:
        """See `longest_sequence`."""
        return longest_sequence(self.max_model_len, self.num_blocks, self.block_size)


def available_bytes() -> int:
    """Memory that a process could take now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def cache_blocks(asked: int | None, bytes_per_block: int, useful: int) -> int:
    """Blocks of the cache: as many as asked for, else what memory allows, at most the `useful` number.

    Raises `ConfigError` where not even one block fits.
    """
    room = available_bytes()
    if asked is not None:
        if asked * bytes_per_block > room:
            need, have = asked * bytes_per_block >> 20, room >> 20
            raise ConfigError(f"--num-kvcache-blocks {asked}: needs {need} MiB, {have} MiB are available")
        return asked
    blocks = min(_CPU_CACHE_BYTES, int(room * _CPU_CACHE_SHARE)) // bytes_per_block
    if blocks < 1:
        raise ConfigError(
            f"not enough memory for one block of {bytes_per_block} bytes: {room >> 20} MiB left"
        )
    return min(blocks, useful)
