"""What a step costs the scheduler: schedule, apply, and the bytes that go out and come back.

usage: python -m bench.scheduler [RUNNING ...]        (default 64 256 1024 4096)

Steady decode of RUNNING sequences with staggered lengths, block size 16, prefix caching on, one step ahead.
One JSON line each: medians over whole block periods, microseconds and bytes; no worker, no sockets. Encoding
the plan and decoding the result count as part of schedule and apply, since the wire is part of the price.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any

import numpy as np

from baton_wire.columns import TOKEN
from baton_wire.frame import OVERHEAD_BYTES
from baton_wire.frontend import Submit
from baton_wire.plan import SAMPLING, Plan
from baton_wire.result import NO_TOKEN, Result
from baton_wire.state import Occupancy, state_hash
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.sequence import Sequence
from scheduler_svc.core.step import Limits

BLOCK_SIZE = 16
STEPS = 25 * BLOCK_SIZE
MAX_TOKENS = 4000


class Echo:
    """A worker without a model: random tokens, a true state hash. No slot ever ends."""

    def __init__(self, max_slots: int) -> None:
        self._rng = np.random.default_rng(0)
        self._slots = np.arange(max_slots)
        self._admitted = np.zeros(max_slots, np.int64)
        self._length = np.zeros(max_slots, np.int64)
        self._occupancy = np.zeros(max_slots, np.uint8)
        self._last = np.full(max_slots, NO_TOKEN, TOKEN)

    def execute(self, payload: bytes) -> bytes:
        """The result of the plan."""
        plan = Plan.decode(payload)
        admitted = plan.admissions["slot"]
        self._admitted[admitted] = plan.step
        self._occupancy[admitted] = Occupancy.PREFILL
        rows = np.flatnonzero(self._occupancy == Occupancy.DECODE)
        self._length[rows] += 1
        for slot, last, start, count in plan.chunks.tolist():
            self._length[slot] = start + count
            if last:
                self._occupancy[slot] = Occupancy.DECODE
                rows = np.append(rows, slot)
        tokens = np.full(plan.row_bound, NO_TOKEN, TOKEN)
        tokens[rows] = self._last[rows] = self._rng.integers(0, 10_000, len(rows))
        live = np.flatnonzero(self._occupancy)
        columns = (self._slots, self._admitted, self._length, self._occupancy, self._last)
        return Result(plan.step, state_hash(*(c[live] for c in columns)), tokens=tokens).encode()


def measure(running: int) -> dict[str, Any]:
    """The figures for so many running sequences."""
    limits = Limits(
        max_slots=running,
        num_blocks=running * 64,
        block_size=BLOCK_SIZE,
        max_model_len=8192,
        max_tokens_per_step=max(16_384, running),
    )
    scheduler, worker, draw = Scheduler(limits), Echo(running), random.Random(0)
    sampling = np.array((0, 0.6, 1.0, 0.0, 0), SAMPLING)
    for owner in range(running):
        prompt = np.array([draw.randint(0, 10_000) for _ in range(draw.randint(100, 300))], TOKEN)
        scheduler.add(Sequence.of(owner, Submit(owner, prompt, MAX_TOKENS, 0, sampling)))

    def plan() -> bytes:
        made = scheduler.schedule()
        assert made is not None
        return made.encode()

    while scheduler.waiting or any(s.planned < len(s.tokens) for s in scheduler.running):
        scheduler.apply(Result.decode(worker.execute(plan())))
    schedule_us, apply_us, plan_bytes, result_bytes = [], [], [], []
    pending = worker.execute(plan())
    for _ in range(STEPS):
        start = time.perf_counter_ns()
        payload = plan()
        middle = time.perf_counter_ns()
        scheduler.apply(Result.decode(pending))
        end = time.perf_counter_ns()
        schedule_us.append((middle - start) / 1e3)
        apply_us.append((end - middle) / 1e3)
        plan_bytes.append(len(payload) + OVERHEAD_BYTES)
        result_bytes.append(len(pending) + OVERHEAD_BYTES)
        pending = worker.execute(payload)
    steps_us = [a + b for a, b in zip(schedule_us, apply_us, strict=True)]
    return {
        "engine": "baton",
        "running": running,
        "schedule_us": round(statistics.median(schedule_us), 1),
        "apply_us": round(statistics.median(apply_us), 1),
        "step_us": round(statistics.median(steps_us), 1),
        "plan_bytes": statistics.median(plan_bytes),
        "plan_bytes_max": max(plan_bytes),
        "result_bytes": statistics.median(result_bytes),
    }


def main() -> None:
    """One JSON line per number of running sequences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("running", nargs="*", type=int, default=[64, 256, 1024, 4096])
    for running in parser.parse_args().running:
        print(json.dumps(measure(running)), flush=True)


if __name__ == "__main__":
    main()
