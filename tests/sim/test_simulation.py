"""The simulator keeps its promises: seeds hold, planted bugs are caught, a seed plays the same each time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton_sim.bugs import BUGS
from baton_sim.simulation import play
from baton_sim.sweep import play_with, sweep

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 1000
BATCH = 50
BUG_SEEDS = 400


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_every_seed_keeps_every_promise(first):
    reports = list(sweep(range(first, first + BATCH)))
    assert [f"python -m baton_sim --seed {r.seed}: {r.error}" for r in reports if r.error] == []
    assert sum(r.faults for r in reports) > 20 * BATCH  # it was no quiet day
    assert sum(r.tokens for r in reports) > 50 * BATCH


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug):
    assert any(report.error for report in sweep(range(BUG_SEEDS), bug))


def test_a_bug_is_gone_when_its_block_ends():
    caught = next(report.seed for report in sweep(range(BUG_SEEDS), "no_dedup") if report.error)
    assert play(caught).error is None


@pytest.mark.parametrize("seed", [1, 4, 9])
def test_a_seed_plays_the_same_in_every_process(seed):
    """Other hash seeds, another process: the same trace to the last line."""
    here = play_with(None, seed, tracing=True)
    assert len(here.trace) > 10
    for hash_seed in ("0", "1"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join([str(ROOT), f"{ROOT}/proto", f"{ROOT}/sim"]),
        }
        command = [sys.executable, "-m", "baton_sim", "--seed", str(seed)]
        there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert there.stdout.splitlines() == [*here.trace, f"seed {seed}: as promised"]


def test_the_command_says_how_to_replay(capfd):
    command = [sys.executable, "-m", "baton_sim", "--seeds", "12", "--bug", "no_dedup", "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), f"{ROOT}/proto", f"{ROOT}/sim"])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "planted bug no_dedup: caught" in done.stdout
    assert "replay: python -m baton_sim --seed 1 --bug no_dedup" in done.stdout
