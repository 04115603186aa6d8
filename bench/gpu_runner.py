"""Runner-only figures of the CUDA worker: production scheduler and CudaRunner in one process, no sockets.

usage: python bench/gpu_runner.py CONFIG_DIR [--quick]

CONFIG_DIR holds a config.json (weights are random). Prints the roofline first, then decode time per token at
several batch sizes, time to first token of an 8,000-token prompt (cold, prefix hit) and the throughput of 256
requests (prompts and outputs of 100 to 1,024 tokens, seed 0), as one JSON line last.
"""

import argparse
import json
import logging
import random
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from baton_wire.columns import TOKEN
from baton_wire.frontend import Submit
from baton_wire.plan import SAMPLING, Plan
from bench.roofline import measure_rates
from gpu_worker import build
from gpu_worker.config import parse
from gpu_worker.cuda.runner import CudaRunner
from gpu_worker.layers import ops
from scheduler_svc.core.credit import Credit
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.sequence import Sequence
from scheduler_svc.core.step import Limits

VOCABULARY = 10_000
_KINDS = (1, 16, 64, 128, 192, 256, 1 << 16)


class Engine:
    """The core's loop over one runner, without a link."""

    def __init__(self, runner: CudaRunner) -> None:
        limits = runner.limits
        self.limits = Limits(
            max_slots=limits.max_slots,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            max_model_len=limits.max_model_len,
            max_tokens_per_step=limits.max_tokens_per_step,
            row_multiple=limits.row_multiple,
        )
        self.runner = runner
        self.reset()

    def reset(self) -> None:
        """Forgets everything, cached prefixes too."""
        self.runner.reset()
        self.scheduler, self.credit, self.owners = Scheduler(self.limits), Credit(), 0

    def run(self, prompts: list[list[int]], lengths: list[int], temperature: float = 0.0) -> dict[str, Any]:
        """Generates so many tokens for each prompt; seconds, host microseconds per step, device time."""
        for prompt, length in zip(prompts, lengths, strict=True):
            sampling = np.array((self.owners, temperature, 1, 0, 0), SAMPLING)
            submit = Submit(self.owners, np.array(prompt, TOKEN), length, 0, sampling)
            self.scheduler.add(Sequence.of(self.owners, submit))
            self.owners += 1
        start = time.perf_counter()
        host_us, tokens = [], 0
        kinds: dict[int, tuple[int, int]] = {}  # (rows that decode, prompt tokens) of steps in flight
        done: list[tuple[int, int, int]] = []  # … and their device microseconds
        while self.scheduler.load or self.scheduler.in_flight:
            while self.scheduler.in_flight < self.credit.plans:
                began = time.perf_counter()
                plan = self.scheduler.schedule()
                if plan is None:
                    break
                self.runner.submit(Plan.decode(plan.encode()))
                host_us.append((time.perf_counter() - began) * 1e6)
                kinds[plan.step] = (plan.bucket, len(plan.chunk_tokens))
            for result in self.runner.finished():
                tokens += len(self.scheduler.apply(result).tokens)
                self.credit.observe(result.exec_us)
                done.append((*kinds.pop(result.step), result.exec_us))
        return {
            "seconds": time.perf_counter() - start,
            "host_us": statistics.median(host_us),
            "device_s": sum(us for *_, us in done) / 1e6,
            "tokens": tokens,
            "steps": done,
        }


def _trace(engine: Engine, prompts: list[list[int]], path: str) -> None:
    """The device time of every kernel over 40 tokens, sorted, to `path` and to stderr."""
    engine.reset()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.run(prompts, [40] * len(prompts))
        torch.cuda.synchronize()
    table = profile.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60)
    with open(path, "w") as file:
        file.write(table)
    print(table, file=sys.stderr)


def _decode(engine: Engine, prompts: list[list[int]]) -> tuple[float, float, float]:
    """Milliseconds per token of steady decode: wall, device; host microseconds per step."""

    def timed(count: int) -> dict[str, Any]:
        engine.reset()
        return engine.run(prompts, [count] * len(prompts))

    timed(8)
    low, high = (min((timed(n) for _ in range(2)), key=lambda r: float(r["seconds"])) for n in (32, 288))
    wall, device = (float(high[k] - low[k]) / 256 * 1e3 for k in ("seconds", "device_s"))
    return wall, device, float(high["host_us"])


def _by_kind(steps: list[tuple[int, int, int]]) -> str:
    """Where a run's device time went: steps with prompts, and the others by rows."""
    kinds: dict[str, list[tuple[int, int, int]]] = {}
    for rows, prompt, us in steps:
        kind = "with prompts" if prompt else f"up to {next(n for n in _KINDS if rows <= n)} rows"
        kinds.setdefault(kind, []).append((rows, prompt, us))
    lines = []
    for kind, found in kinds.items():
        rows, prompt, us = (sum(column) for column in zip(*found, strict=True))
        lines.append(
            f"{kind}: {len(found)} steps, {us / 1e6:.2f} s, {us / len(found) / 1e3:.2f} ms each; "
            f"{rows / len(found):.0f} rows, {prompt} prompt tokens"
        )
    return "\n".join(lines)


def _throughput(engine: Engine, rounds: int) -> list[int]:
    """Output tokens per second of the 256 requests, round by round, no prefix in the cache."""
    random.seed(0)
    prompts = [[random.randint(0, VOCABULARY) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    rates = []
    for _ in range(rounds):
        engine.reset()
        run = engine.run(prompts, lengths, temperature=0.6)
        rates.append(round(run["tokens"] / run["seconds"]))
    print(_by_kind(run["steps"]), file=sys.stderr, flush=True)
    return rates


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder with a config.json")
    parser.add_argument("--quick", action="store_true", help="no throughput run")
    parser.add_argument("--rounds", type=int, default=2, help="of the throughput run [2]")
    parser.add_argument("--slots", type=int, default=512, help="sequences that run at a time [512]")
    parser.add_argument("--eager", action="store_true", help="no captured graphs")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--deterministic", action="store_true", help="as the worker's option")
    parser.add_argument("--no-pdl", action="store_true", help="no dependent launches")
    parser.add_argument("--trace", metavar="FILE", help="write profiles of decode to FILE-bN.txt")
    parser.add_argument("--block-size", type=int, default=64, help="positions of a cache block [64]")
    return parser.parse_args()


def _make_runner(a: argparse.Namespace) -> CudaRunner:
    options = ["--device", "cuda", "--load-format", "dummy", "--max-model-len", "8192"]
    options += ["--max-num-seqs", str(a.slots), "--max-num-batched-tokens", "16384"]
    options += ["--kvcache-block-size", str(a.block_size)]
    options += ["--enforce-eager"] if a.eager else []
    options += ["--deterministic"] if a.deterministic else []
    config = parse(["--model", a.model, *options])
    runner = build.make_runner(config, build.load_model(config))
    assert isinstance(runner, CudaRunner)
    return runner


def main() -> None:
    """Measures; JSON last."""
    a = _arguments()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if a.no_pdl:
        ops.EARLY = False
    print(json.dumps({"roofline": measure_rates()}), flush=True)
    torch.cuda.empty_cache()
    began = time.perf_counter()
    engine = Engine(_make_runner(a))
    figures: dict[str, Any] = {"engine": "baton", "scope": "runner-only", "model": a.model}
    figures["start_s"] = round(time.perf_counter() - began, 1)
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randint(0, VOCABULARY) for _ in range(length)]

    for batch in a.batches:
        wall, device, host = _decode(engine, [prompt(128) for _ in range(batch)])
        figures[f"tpot_ms_b{batch}"], figures[f"device_ms_b{batch}"] = round(wall, 4), round(device, 4)
        figures[f"host_us_b{batch}"] = round(host)
        print(json.dumps(figures), flush=True)
        if a.trace:
            _trace(engine, [prompt(128) for _ in range(batch)], f"{a.trace}-b{batch}.txt")
    long = [prompt(8000) for _ in range(3)]
    engine.reset()
    engine.run([long[0]], [1])
    for name in ("cold", "hit"):
        seconds = min(engine.run([p], [1])["seconds"] for p in long[1:])
        figures[f"ttft_8k_{name}_ms"] = round(seconds * 1e3, 2)
    if not a.quick:
        figures["throughput_tok_s"] = _throughput(engine, a.rounds)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
