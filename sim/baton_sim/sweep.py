"""Plays many seeds, on several processes, with a planted bug if asked to."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from functools import partial

from baton_sim.bugs import BUGS
from baton_sim.simulation import Report, play

BATCH = 10


def play_with(bug: str | None, seed: int, tracing: bool = False) -> Report:
    """One seed, with the bug of that name planted."""
    with nullcontext() if bug is None else BUGS[bug]():
        return play(seed, tracing)


def sweep(seeds: range, bug: str | None = None, jobs: int = 1) -> Iterator[Report]:
    """Reports of all seeds, in the order in which they are done."""
    if jobs == 1:
        yield from (play_with(bug, seed) for seed in seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        batches = [seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH)]
        for future in as_completed([pool.submit(_batch, bug, batch) for batch in batches]):
            yield from future.result()


def _batch(bug: str | None, seeds: range) -> list[Report]:
    return list(map(partial(play_with, bug), seeds))
