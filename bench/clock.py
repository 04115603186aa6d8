"""What measurements of kernels share: a clock for launches in captured graphs, sizes, random inputs."""

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.shapes import SHAPES

DEVICE = "cuda"
EPS = 1e-6
Measures = dict[str, Any]
Launch = Callable[[], Any]
SMALL, LARGE = SHAPES["0.6b"], SHAPES["8b"]


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


class Clock:
    """Times launches, or only makes them; `quick`: of fewer cases, and not as often."""

    def __init__(self, compile_only: bool, quick: bool = False) -> None:
        self.compile_only, self.quick = compile_only, quick

    def graph_us(self, launches: Sequence[Launch], replays: int = 20) -> float:
        """Microseconds of one of the launches, in a graph of all of them."""
        for launch in launches[:1] if self.compile_only else launches:
            launch()
        torch.cuda.synchronize()
        if self.compile_only:
            return 0.0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        times: list[float] = []
        for _ in range(replays + 3):
            begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            graph.replay()
            done.record()
            torch.cuda.synchronize()
            times.append(begun.elapsed_time(done) * 1e3 / len(launches))
        return round(statistics.median(times[3:]), 2)


def show(results: list[Measures], **measure: Any) -> None:
    """Adds a measurement, and prints it."""
    results.append(measure)
    print(measure, flush=True)


def bench_lengths(batch: int) -> list[int]:
    """Lengths in the middle of the offline bench: prompts and outputs of 100 to 1024 tokens."""
    rng = random.Random(batch)
    return [rng.randint(100, 1024) + int(rng.random() * rng.randint(100, 1024)) for _ in range(batch)]
