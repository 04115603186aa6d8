"""Streamed tokens per second through scheduler and gRPC, with a fake worker that costs next to nothing.

usage: python -m bench.streaming [--quick] [--streams N …] [--tokens N] [--repeats N]

Measures everything but the model: core, wire, front-end, detokenizer, gRPC and the Python client, all on this
host. All streams of a round start at once. One JSON line per number of streams: tokens and messages per
second (median round), TTFT and the longest pause of a stream in milliseconds; a JSON summary last.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass

from baton_client import AsyncClient, BatonError, Delta, Sampling, Stack, StackOptions
from baton_client.stack import demo_model
from baton_client.timing import percentile

_PROMPT_TOKENS = 16
_BLOCK_SIZE = 16


@dataclass(slots=True)
class Stream:
    """What one stream saw."""

    tokens: int = 0
    messages: int = 0
    ttft_ms: float = 0.0
    pause_ms: float = 0.0


def main() -> int:
    """Measure and print; return the exit code."""
    arguments = _arguments()
    model = str(demo_model())  # for its tokenizer
    most = max(arguments.streams)
    blocks = most * (2 + (_PROMPT_TOKENS + arguments.tokens) // _BLOCK_SIZE)
    options = StackOptions(
        model=model,
        worker_command=("baton_sim.fake_worker", "--model", model),
        worker_args=(
            *("--max-num-seqs", str(most), "--step-us", str(arguments.step_us)),
            *("--kvcache-block-size", str(_BLOCK_SIZE), "--num-kvcache-blocks", str(blocks)),
        ),
    )
    results = []
    try:
        _say("starting the stack with a fake worker")
        with Stack.start(options) as stack:
            for streams in arguments.streams:
                results.append(_measure(stack.address, streams, arguments.tokens, arguments.repeats))
                print(json.dumps(results[-1]), flush=True)
                stack.check()
    except BatonError as error:
        print(f"streaming: {error.message}", file=sys.stderr)
        return 1
    print(json.dumps({"bench": "streaming", "step_us": arguments.step_us, "cases": results}))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Streamed tokens per second with a fake worker.")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256], help="streams at once")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of a stream (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--step-us",
        type=int,
        default=1000,
        help="what a step of the fake worker takes (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.streams, arguments.tokens, arguments.repeats = [16], 50, 1
    return arguments


def _measure(address: str, streams: int, tokens: int, repeats: int) -> dict[str, object]:
    """Return the medians of `repeats` rounds, after one that does not count."""
    asyncio.run(_round(address, streams, min(tokens, 20)))
    rates, message_rates = [], []
    ttfts_ms: list[float] = []
    pauses_ms: list[float] = []
    for number in range(repeats):
        started = time.perf_counter()
        seen = asyncio.run(_round(address, streams, tokens))
        elapsed_s = time.perf_counter() - started
        rates.append(sum(stream.tokens for stream in seen) / elapsed_s)
        message_rates.append(sum(stream.messages for stream in seen) / elapsed_s)
        ttfts_ms += [stream.ttft_ms for stream in seen]
        pauses_ms += [stream.pause_ms for stream in seen]
        _say(f"{streams} streams, round {number + 1}/{repeats}: {rates[-1]:.0f} tok/s")
    return {
        "streams": streams,
        "tokens_per_s": round(statistics.median(rates)),
        "messages_per_s": round(statistics.median(message_rates)),
        "ttft_ms_p50": round(percentile(ttfts_ms, 50), 2),
        "ttft_ms_p99": round(percentile(ttfts_ms, 99), 2),
        "pause_ms_p50": round(percentile(pauses_ms, 50), 2),
        "pause_ms_p99": round(percentile(pauses_ms, 99), 2),
    }


async def _round(address: str, streams: int, tokens: int) -> list[Stream]:
    """Run all streams at once; return what each saw. Every token is accounted for."""
    async with AsyncClient(address) as client:
        await client.model()
        seen = await asyncio.gather(*(_stream(client, index, tokens) for index in range(streams)))
    assert all(stream.tokens == tokens for stream in seen)
    return list(seen)


async def _stream(client: AsyncClient, index: int, tokens: int) -> Stream:
    seen = Stream()
    prompt = [(index * _PROMPT_TOKENS + place) % 1000 for place in range(_PROMPT_TOKENS)]
    last = started = time.perf_counter()
    async with client.generate(prompt, Sampling(max_tokens=tokens, ignore_eos=True, seed=index)) as stream:
        async for event in stream:
            if not isinstance(event, Delta):
                continue
            now = time.perf_counter()
            if seen.messages == 0:
                seen.ttft_ms = (now - started) * 1e3
            else:
                seen.pause_ms = max(seen.pause_ms, (now - last) * 1e3)
            last = now
            seen.messages += 1
            seen.tokens += len(event.token_ids)
    return seen


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
