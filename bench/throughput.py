"""CPU throughput against `transformers.generate`, in one run, on the same threads.

usage: python -m bench.throughput [--quick] [--threads N] [--repeats N] [--model DIR]

Two checkpoints: the demo model, and random weights in the shape of a 4-layer Qwen3-0.6B. Two workloads each:
one request alone, and 32 requests of mixed lengths that arrive staggered. The reference serves as `generate`
does: one call per request, in order of arrival, greedy, float32, no end token; a call's prefill and decode
are both timed. Ours goes through gRPC, scheduler and worker on this host. Requests whose tokens are the same
on both sides are counted (near-ties may fall either way). Repeats alternate; medians, JSON last.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from baton_client import AsyncClient, BatonError, Delta, Sampling, Stack, StackOptions
from bench.checkpoint import DEMO_MODEL, save_shaped
from bench.workload import Request, Run, single, staggered

GOALS = {"single": 0.95, "staggered": 5.0}
_STAGGER_S = 0.005
_LONG, _MEDIUM = 128, 48  # tokens of the longest answer: a large model gets minutes, not hours


def main() -> int:
    """Measure and print; return the exit code."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    if load > 0.5:
        _say(f"the load average is {load:.1f}: whatever else runs here makes these figures worse")
    cases = []
    try:
        if arguments.model:
            cases += _measure_model(Path(arguments.model).name, Path(arguments.model), _MEDIUM, arguments)
        else:
            cases += _measure_model("demo", DEMO_MODEL, _LONG, arguments)
            with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
                _say("making the 4-layer checkpoint")
                save_shaped(Path(folder), vocab_size=16_384 if arguments.quick else 151_936)
                cases += _measure_model("0.6b-4-layers", Path(folder), _MEDIUM, arguments)
    except BatonError as error:
        print(f"throughput: {error.message}", file=sys.stderr)
        return 1
    print(
        json.dumps(
            {
                "bench": "throughput",
                "threads": arguments.threads,
                "load_before": round(load, 2),
                "cases": cases,
            }
        )
    )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU throughput against transformers.generate.")
    parser.add_argument(
        "--quick", action="store_true", help="short answers, one repeat, a smaller vocabulary"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of both (default: all cores)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="medians are over so many (default: %(default)s)"
    )
    parser.add_argument("--model", metavar="DIR", help="measure this checkpoint in place of the two")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats = 1
    return arguments


def _measure_model(
    name: str, path: Path, longest: int, arguments: argparse.Namespace
) -> list[dict[str, object]]:
    """Return one result per workload; prompts and answers have at most `longest` tokens."""
    _say(f"{name}: loading the reference")
    reference = Reference(path)
    _say(f"{name}: {reference.ceiling()}")
    vocab_size = reference.vocab_size
    answer = longest // 4 if arguments.quick else longest
    workloads: dict[str, Callable[[int], list[Request]]] = {
        "single": lambda seed: single(seed, vocab_size, 64, answer),
        "staggered": lambda seed: staggered(
            seed, vocab_size, 32, (8, longest), (answer // 8, answer), _STAGGER_S
        ),
    }
    environment = {"OMP_NUM_THREADS": str(arguments.threads)}
    results = []
    _say(f"{name}: starting the stack")
    with Stack.start(StackOptions(model=str(path), environment=environment)) as stack:
        for workload, requests_of in workloads.items():
            results.append(
                {"model": name, "workload": workload}
                | _compare(
                    f"{name} {workload}",
                    requests_of,
                    lambda given: asyncio.run(_serve(stack.address, given)),
                    reference.serve,
                    arguments.repeats,
                    GOALS[workload],
                )
            )
            stack.check()
    return results


def _compare(
    title: str,
    requests_of: Callable[[int], list[Request]],
    ours: Callable[[list[Request]], Run],
    theirs: Callable[[list[Request]], Run],
    repeats: int,
    goal: float,
) -> dict[str, object]:
    """Run both sides in turn, after one round each that does not count."""
    ours(requests_of(0)), theirs(requests_of(0)[:2])
    pairs = []
    for seed in range(1, repeats + 1):  # prompts never repeat: nothing here comes from the prefix cache
        requests = requests_of(seed)
        mine, other = ours(requests), theirs(requests)
        pairs.append((mine, other))
        _say(
            f"{title} {seed}/{repeats}: {mine.tokens_per_s:.1f} tok/s, "
            f"transformers {other.tokens_per_s:.1f}: {mine.tokens_per_s / other.tokens_per_s:.2f}×"
        )
    outputs = [(a, b) for mine, other in pairs for a, b in zip(mine.outputs, other.outputs, strict=True)]
    own = statistics.median(mine.tokens_per_s for mine, _ in pairs)
    reference = statistics.median(other.tokens_per_s for _, other in pairs)
    return {
        "tokens_per_s": round(own, 1),
        "transformers_tokens_per_s": round(reference, 1),
        "ratio": round(own / reference, 3),
        "goal": goal,
        "ratios": [round(mine.tokens_per_s / other.tokens_per_s, 3) for mine, other in pairs],
        "same_tokens": f"{sum(a == b for a, b in outputs)}/{len(outputs)}",
    }


class Reference:
    """transformers on this process's threads."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.vocab_size: int = self._model.config.vocab_size

    def ceiling(self) -> str:
        """Say what memory bandwidth allows: a step at batch 1 reads every weight once."""
        weights_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())
        data = torch.ones(64 << 20)
        data.sum()
        started = time.perf_counter()
        for _ in range(5):
            data.sum()
        bytes_per_s = 5 * data.numel() * data.element_size() / (time.perf_counter() - started)
        return (
            f"{weights_bytes / 1e6:.0f} MB of weights, memory read at {bytes_per_s / 1e9:.1f} GB/s: "
            f"at most {bytes_per_s / weights_bytes:.0f} tok/s one by one (more if the caches hold them)"
        )

    def serve(self, requests: list[Request]) -> Run:
        """Answer one request after the other, none before it arrives."""
        outputs = []
        started = time.perf_counter()
        for request in requests:
            time.sleep(max(0.0, started + request.arrival_s - time.perf_counter()))
            outputs.append(self._generate(request))
        return Run(time.perf_counter() - started, outputs)

    def _generate(self, request: Request) -> list[int]:
        ids = torch.tensor([request.token_ids])
        with torch.inference_mode():
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens: list[int] = output[0, len(request.token_ids) :].tolist()
        return tokens


async def _serve(address: str, requests: list[Request]) -> Run:
    """Send every request when it arrives, all over one stream; wait for all."""
    async with AsyncClient(address) as client:
        await client.model()
        outputs: list[list[int]] = [[] for _ in requests]
        started = time.perf_counter()
        async with client.mux() as mux:

            async def arrivals() -> None:
                for number, request in enumerate(requests):
                    await asyncio.sleep(max(0.0, started + request.arrival_s - time.perf_counter()))
                    sampling = Sampling(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
                    mux.start(number, request.token_ids, sampling)
                mux.done()

            sending = asyncio.create_task(arrivals())
            async for batch in mux:
                for number, event in batch:
                    if isinstance(event, BatonError):
                        raise event
                    if isinstance(event, Delta):
                        outputs[number] += event.token_ids
            await sending
        return Run(time.perf_counter() - started, outputs)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
