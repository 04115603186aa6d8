"""Streamed tokens per second, and what streaming adds to each, with a fake worker that costs next to nothing.

usage: python -m bench.streaming [--quick] [--by mux plain] [--streams N …] [--tokens N] [--step-us N]

Measures everything but the model: core, wire, front-end, detokenizer, gRPC and the Python client, all on this
host. All requests of a round start at once, over a call each (plain) or all over one (mux). The worker's
steps take `--step-us`, so that N streams are offered N tokens per step. One JSON line per case: tokens and
messages per second (median round), TTFT, and the time from the end of a token's step to its arrival (added
latency) in milliseconds, over all tokens of all rounds; a JSON summary last.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from baton_client import AsyncClient, BatonError, Delta, Finish, Sampling, Stack, StackOptions
from baton_client.stack import demo_model
from baton_client.timing import percentile
from bench.added_latency import Arrivals

_PROMPT_TOKENS = 16
_BLOCK_SIZE = 16
_seeds = itertools.count(1)


@dataclass(slots=True)
class Case:
    """Requests at once by one way, and what all rounds of them saw."""

    by: str
    streams: int
    arrivals: Arrivals = field(default_factory=Arrivals)
    ttfts_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    messages_per_s: list[float] = field(default_factory=list)

    def summary(self, step_log: Path) -> dict[str, object]:
        """What is printed; the worker that wrote the log must have ended."""
        added_ms = sorted(self.arrivals.added_ms(step_log).tolist())
        return {
            "by": self.by,
            "streams": self.streams,
            "tokens_per_s": round(statistics.median(self.tokens_per_s)),
            "messages_per_s": round(statistics.median(self.messages_per_s)),
            "ttft_ms_p50": round(percentile(self.ttfts_ms, 50), 2),
            "ttft_ms_p99": round(percentile(self.ttfts_ms, 99), 2),
            **{f"added_ms_p{p}": round(percentile(added_ms, p), 2) for p in (50, 90, 99)},
            "added_ms_max": round(added_ms[-1], 2),
        }


def main() -> int:
    """Measure and print; return the exit code."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        step_log = Path(folder) / "steps"
        cases = [Case(by, streams) for by in arguments.by for streams in arguments.streams]
        try:
            _say("starting the stack with a fake worker")
            with Stack.start(_stack_options(arguments, step_log)) as stack:
                for case in cases:
                    _measure(case, stack.address, arguments.tokens, arguments.repeats)
                    stack.check()
        except BatonError as error:
            print(f"streaming: {error.message}", file=sys.stderr)
            return 1
        results = [case.summary(step_log) for case in cases]
    for result in results:
        print(json.dumps(result))
    settings = {"step_us": arguments.step_us, "frontends": arguments.frontends}
    print(json.dumps({"bench": "streaming", **settings, "cases": results}))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Streamed tokens per second with a fake worker.")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--by", nargs="+", choices=["mux", "plain"], default=["mux", "plain"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256], help="requests at once")
    parser.add_argument("--tokens", type=int, default=600, help="tokens of each (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--frontends", type=int, default=1, help="front-end processes (default: %(default)s)")
    parser.add_argument(
        "--step-us",
        type=int,
        default=5000,
        help="what a step of the fake worker takes (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.tokens, arguments.repeats = [16], 50, 1
    return arguments


def _stack_options(arguments: argparse.Namespace, step_log: Path) -> StackOptions:
    model = str(demo_model())  # for its tokenizer
    most = max(arguments.streams)
    blocks = most * (2 + (_PROMPT_TOKENS + arguments.tokens) // _BLOCK_SIZE)
    return StackOptions(
        model=model,
        worker_command=("baton_sim.fake_worker", "--model", model),
        scheduler_args=("--frontends", str(arguments.frontends)),
        worker_args=(
            *("--max-num-seqs", str(most), "--step-us", str(arguments.step_us)),
            *("--kvcache-block-size", str(_BLOCK_SIZE), "--num-kvcache-blocks", str(blocks)),
            *("--max-num-batched-tokens", str(most * _PROMPT_TOKENS), "--step-log", str(step_log)),
        ),
    )


def _measure(case: Case, address: str, tokens: int, repeats: int) -> None:
    """Some rounds, after a short one that does not count."""
    play = _mux_round if case.by == "mux" else _plain_round
    asyncio.run(play(Case(case.by, case.streams), address, min(tokens, 20)))
    for number in range(repeats):
        started = time.perf_counter()
        messages = asyncio.run(play(case, address, tokens))
        elapsed_s = time.perf_counter() - started
        case.tokens_per_s.append(case.streams * tokens / elapsed_s)
        case.messages_per_s.append(messages / elapsed_s)
        rate = f"{case.tokens_per_s[-1]:.0f} tok/s"
        _say(f"{case.streams} streams by {case.by}, round {number + 1}/{repeats}: {rate}")


async def _plain_round(case: Case, address: str, tokens: int) -> int:
    """A call for each request; the number of messages. Every token is accounted for."""
    async with AsyncClient(address) as client:
        await client.model()
        counts = await asyncio.gather(*(_stream(client, case, tokens) for _ in range(case.streams)))
    return sum(counts)


async def _stream(client: AsyncClient, case: Case, tokens: int) -> int:
    seed = next(_seeds)
    seen = messages = 0
    started_ns = time.monotonic_ns()
    async with client.generate(_prompt(seed), _sampling(seed, tokens)) as stream:
        async for event in stream:
            messages += 1
            if isinstance(event, Delta):
                seen += _arrived(case, seed, event, started_ns, time.monotonic_ns())
    assert seen == tokens
    return messages


async def _mux_round(case: Case, address: str, tokens: int) -> int:
    """One call for all requests; the number of messages. Every token is accounted for."""
    async with AsyncClient(address) as client:
        await client.model()
        left = {next(_seeds): tokens for _ in range(case.streams)}
        messages = 0
        started_ns = time.monotonic_ns()
        async with client.mux() as mux:
            for seed in left:
                mux.start(seed, _prompt(seed), _sampling(seed, tokens))
            mux.done()
            async for batch in mux:
                now_ns = time.monotonic_ns()
                messages += 1
                for seed, event in batch:
                    if isinstance(event, Delta):
                        left[seed] -= _arrived(case, seed, event, started_ns, now_ns)
                    else:
                        assert isinstance(event, Finish)
                        assert left[seed] == 0
    assert not any(left.values())
    return messages


def _arrived(case: Case, seed: int, delta: Delta, started_ns: int, now_ns: int) -> int:
    count = len(delta.token_ids)
    case.arrivals.add(seed, _PROMPT_TOKENS + delta.index, count, now_ns)
    if delta.index == 0:
        case.ttfts_ms.append((now_ns - started_ns) / 1e6)
    return count


def _prompt(seed: int) -> list[int]:
    return [(seed * _PROMPT_TOKENS + place) % 1000 for place in range(_PROMPT_TOKENS)]


def _sampling(seed: int, tokens: int) -> Sampling:
    return Sampling(max_tokens=tokens, ignore_eos=True, seed=seed)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
