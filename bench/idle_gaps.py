"""How long the device idles in steady decode through the whole stack, from a trace of what ran on it.

usage: python -m bench.idle_gaps MODEL_DIR [--batches 1 256] [--traces DIR] [--worker='--max-model-len 8192']

Scheduler, front-end and worker run as processes; the client is here, over one gRPC mux stream. Once decode is
steady, the worker traces some steps (`--trace-dir`); the time per token is taken before and after, without
tracing, so that their mean belongs to the length that sequences have in the trace. In the trace, spans of
kernels and copies are united (launches ahead make them overlap), the first fifth and the last tenth left
out, where tracing starts and stops. In percent of the wall time:

  idle       what no span covers, the moments between two kernels of a captured graph included
  starved    of it, gaps of more than 5 µs: the queue was dry, the host was late
  untraced   what the spans of a step do not cover of a step without tracing, which makes the host slower

MODEL_DIR holds config.json and a tokenizer; weights are random. JSON last.
"""

import argparse
import asyncio
import json
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton_client import AsyncClient, AsyncMux, BatonError, Delta, Finish, Sampling, Stack, StackOptions

STARVED_US = 5.0
_STEP_END = "advance_kernel"  # which writes a step's result
_SPANS = {"kernel", "gpu_memcpy", "gpu_memset"}
_SKIP_FIRST, _SKIP_LAST = 0.2, 0.1
_SETTLE, _WATCH = 64, 400  # tokens of each request before, and while, time is taken without a trace
_PROMPT, _VOCABULARY = 128, 1000


@dataclass(frozen=True, slots=True)
class Span:
    """Something that ran on the device: microseconds, and what it was."""

    begin: float
    end: float
    name: str


def spans_of(trace: dict[str, Any], kinds: set[str] = _SPANS) -> list[Span]:
    """Those of the trace's steady part, in order of their beginning."""
    spans = [
        Span(e["ts"], e["ts"] + e["dur"], e["name"])
        for e in trace["traceEvents"]
        if e.get("ph") == "X" and e.get("cat") in kinds
    ]
    if not spans:
        raise ValueError("nothing ran on the device while it was traced")
    spans.sort(key=lambda span: span.begin)
    first, last = spans[0].begin, max(span.end for span in spans)
    low, high = first + _SKIP_FIRST * (last - first), last - _SKIP_LAST * (last - first)
    return [span for span in spans if low <= span.begin and span.end <= high]


def gaps_of(spans: list[Span]) -> list[tuple[float, str, str]]:
    """Stretches that no span covers: microseconds, what ran before, what ran after."""
    gaps = []
    latest = spans[0]
    for span in spans[1:]:
        if span.begin > latest.end:
            gaps.append((span.begin - latest.end, latest.name, span.name))
        if span.end > latest.end:
            latest = span
    return gaps


def summary(spans: list[Span]) -> dict[str, Any]:
    """Shares of the wall time in percent, and where most of it goes."""
    wall = max(span.end for span in spans) - spans[0].begin
    gaps = gaps_of(spans)
    starved = [gap for gap in gaps if gap[0] > STARVED_US]
    steps = max(1, sum(_STEP_END in span.name for span in spans))
    times: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        times[span.name[:70]] += span.end - span.begin
    longest = sorted(times.items(), key=lambda item: -item[1])[:14]
    return {
        "wall_ms": round(wall / 1e3, 3),
        "steps": steps,
        "step_ms": round(wall / steps / 1e3, 4),
        "idle_percent": round(100 * sum(us for us, _, _ in gaps) / wall, 2),
        "starved_percent": round(100 * sum(us for us, _, _ in starved) / wall, 2),
        "starved_gaps": len(starved),
        "longest_us": [[round(us, 1), a[:40], b[:40]] for us, a, b in sorted(gaps, reverse=True)[:6]],
        "us_per_step": {name: round(us / steps, 1) for name, us in longest},
    }


async def _watch(stack: Stack, batch: int, traces: Path) -> tuple[float, Path]:
    """Decodes around a trace: milliseconds per token without it, and the trace."""
    known = set(traces.glob("trace-*.json"))
    draw = random.Random(batch)
    async with AsyncClient(stack.address) as client:
        limit = (await client.model()).max_model_len - _PROMPT
        async with client.mux() as mux:
            for number in range(batch):
                prompt = [draw.randrange(2, _VOCABULARY) for _ in range(_PROMPT)]
                mux.start(number, prompt, Sampling(temperature=0.0, max_tokens=limit, ignore_eos=True))
            before = await _ms_per_token(mux, batch)
            stack.signal_workers(signal.SIGUSR1)
            while not (new := set(traces.glob("trace-*.json")) - known):
                await _tokens(mux)
            return (before + await _ms_per_token(mux, batch)) / 2, new.pop()


async def _ms_per_token(mux: AsyncMux, batch: int) -> float:
    """Milliseconds per token of each request, once some have settled."""
    settled = 0
    while settled < _SETTLE * batch:
        settled += await _tokens(mux)
    tokens, started = 0, time.perf_counter()
    while tokens < _WATCH * batch:
        tokens += await _tokens(mux)
    return (time.perf_counter() - started) / tokens * batch * 1e3


async def _tokens(mux: AsyncMux) -> int:
    """The number that came with the next message."""
    events = [event for _, event in await anext(mux)]
    for event in events:
        if isinstance(event, BatonError):
            raise event
        if isinstance(event, Finish):
            raise BatonError("a request ended at the model's length before all was measured")
    return sum(len(event.token_ids) for event in events if isinstance(event, Delta))


def main() -> int:
    """Measures and prints."""
    a = _arguments()
    results: dict[str, Any] = {"bench": "idle_gaps", "model": a.model, "device": a.device, "batches": {}}
    kinds = _SPANS if a.device == "cuda" else {"cpu_op"}
    with tempfile.TemporaryDirectory(prefix="baton-traces-") as folder:
        traces = a.traces or Path(folder)
        worker = ["--device", a.device, "--load-format", "dummy", "--trace-dir", str(traces)]
        worker += ["--trace-steps", str(a.steps), *a.worker]
        with Stack.start(StackOptions(model=a.model, worker_args=worker)) as stack:
            for batch in a.batches:
                ms_per_token, path = asyncio.run(_watch(stack, batch, traces))
                found = summary(spans_of(json.loads(path.read_text()), kinds))
                busy = found["step_ms"] * (1 - found["idle_percent"] / 100)
                found["untraced_ms_per_token"] = round(ms_per_token, 4)
                found["untraced_percent"] = round(100 * (1 - busy / ms_per_token), 2)
                results["batches"][batch] = found
                print(f"batch {batch}: {json.dumps(found)}", file=sys.stderr, flush=True)
            stack.stop(drain=False)
    print(json.dumps(results))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder with config.json and a tokenizer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=100, help="to trace [100]")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="keep the traces here")
    parser.add_argument("--worker", type=shlex.split, default=[], help="more options of the worker")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
