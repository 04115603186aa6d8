"""The figures that every engine is measured by, and the child process that measures one of them.

usage: python -m bench.figures ENGINE MODEL_DIR --device DEVICE [--scale full|brief|small] [--parts PART ...]

Prints one JSON object per figure as it comes: {"figure": name, "value": number or list}.
"""

import argparse
import importlib
import json
import random
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bench.engines.interface import Engine, Options
from bench.workload import Request

_IDS = 10_000  # prompts are drawn from ids [0, _IDS]
Figure = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is asked. Lengths in tokens, both ends included."""

    requests: int
    lengths: tuple[int, int]  # of prompts and of outputs of the offline run
    rounds: int
    batches: tuple[int, ...]
    decode_prompt: int
    decode: tuple[int, int]  # outputs whose difference in time is steady decode
    long_prompt: int
    rates: tuple[float, ...]  # requests a second
    online_s: float
    online_outputs: tuple[int, int]
    max_model_len: int
    max_num_seqs: int
    ids: int = _IDS


SCALES = {
    "full": Scale(
        256, (100, 1024), 2, (1, 8, 64, 256), 128, (32, 288), 8000, (8.0, 24.0), 8.0, (50, 200), 8192, 512
    ),
    "small": Scale(6, (4, 24), 1, (1, 4), 8, (4, 12), 100, (20.0,), 0.5, (4, 12), 256, 16, ids=1200),
}
SCALES["brief"] = replace(SCALES["full"], rounds=1, rates=(24.0,))


def throughput(engine: Engine, scale: Scale) -> Iterator[Figure]:
    """Output tokens a second of requests that are all there at the start.

    Lengths are drawn as nano-vLLM's bench draws them (seed 0); every round has other tokens, so that no round
    finds its prompts in the prefix cache.
    """
    random.seed(0)
    prompts = [_draw(random, random.randint(*scale.lengths), scale) for _ in range(scale.requests)]
    outputs = [random.randint(*scale.lengths) for _ in range(scale.requests)]
    rates = []
    for shift in range(scale.rounds):
        moved = [[(token + shift) % (scale.ids + 1) for token in prompt] for prompt in prompts]
        requests = [Request(p, n, 0.0, temperature=0.6) for p, n in zip(moved, outputs, strict=True)]
        rates.append(round(sum(outputs) / _seconds(engine.serve(requests))))
    yield "throughput_tok_s", rates


def decode(engine: Engine, scale: Scale) -> Iterator[Figure]:
    """Milliseconds per token of steady decode: between a short and a long answer, each the best of two."""
    draw = random.Random(1)

    def timed(batch: int, count: int) -> float:
        prompts = [_draw(draw, scale.decode_prompt, scale) for _ in range(batch)]
        return _seconds(engine.serve([Request(prompt, count, 0.0) for prompt in prompts]))

    low, high = scale.decode
    for batch in scale.batches:
        timed(batch, low)
        short, long = (min(timed(batch, count) for _ in range(2)) for count in (low, high))
        yield f"tpot_ms_b{batch}", round((long - short) / (high - low) * 1e3, 4)


def first_token(engine: Engine, scale: Scale) -> Iterator[Figure]:
    """Milliseconds to the first token of a long prompt: unknown, and known to the prefix cache."""
    draw = random.Random(2)
    prompts = [_draw(draw, scale.long_prompt, scale) for _ in range(3)]

    def timed(prompt: list[int]) -> float:
        return _seconds(engine.serve([Request(prompt, 1, 0.0)])) * 1e3

    timed(prompts[0])
    for name in ("cold", "hit"):
        yield f"ttft_long_{name}_ms", round(min(timed(prompt) for prompt in prompts[1:]), 2)


def online(engine: Engine, scale: Scale) -> Iterator[Figure]:
    """Requests that arrive at random (Poisson): milliseconds to the first token and between tokens."""
    for rate in scale.rates:
        draw = random.Random(int(rate * 1000))
        requests, at = [], 0.0
        while at < scale.online_s:
            prompt = _draw(draw, draw.randint(*scale.lengths), scale)
            requests.append(Request(prompt, draw.randint(*scale.online_outputs), at, temperature=0.6))
            at += draw.expovariate(rate)
        times = engine.serve(requests)
        first = [came[0] - request.arrival_s for came, request in zip(times, requests, strict=True)]
        between = [(came[-1] - came[0]) / (len(came) - 1) for came in times]
        tokens = sum(map(len, times))
        yield (
            f"online_{rate:g}_per_s",
            {
                "tok_s": round(tokens / max(came[-1] for came in times)),
                "ttft_ms_p50": _percentile(first, 50),
                "ttft_ms_p99": _percentile(first, 99),
                "tpot_ms_p50": _percentile(between, 50),
                "tpot_ms_p99": _percentile(between, 99),
            },
        )


PARTS = {"decode": decode, "first-token": first_token, "throughput": throughput, "online": online}


def measure(engine: Engine, scale: Scale, parts: Iterable[str]) -> Iterator[Figure]:
    """Times of start, then the figures of these parts, after a round that does not count."""
    draw = random.Random(3)
    engine.serve([Request(_draw(draw, 30, scale), 16, 0.0, temperature=0.6) for _ in range(4)])
    for name, seconds in engine.starts_s.items():
        yield f"start_{name}_s", round(seconds, 1)
    for part in parts:
        yield from PARTS[part](engine, scale)


def _draw(source: Any, length: int, scale: Scale) -> list[int]:
    return [source.randint(0, scale.ids) for _ in range(length)]


def _seconds(times: list[list[float]]) -> float:
    return max(came[-1] for came in times)


def _percentile(seconds: list[float], percent: int) -> float:
    if len(seconds) < 2:
        return round(seconds[0] * 1e3, 2)
    return round(statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1] * 1e3, 2)


def main() -> None:
    """Measures one engine."""
    parser = argparse.ArgumentParser(description="Measure one engine; see bench/gpu.py.")
    parser.add_argument("engine", choices=("baton", "vllm"))
    parser.add_argument("model", help="folder with config.json and a tokenizer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    a = parser.parse_args()
    scale = SCALES[a.scale]
    options = Options(a.model, a.device, scale.max_model_len, scale.max_num_seqs)
    engine: Engine = importlib.import_module(f"bench.engines.{a.engine}").make(options)
    try:
        for name, value in measure(engine, scale, a.parts):
            print(json.dumps({"figure": name, "value": value}), flush=True)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
