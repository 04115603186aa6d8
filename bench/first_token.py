"""What everything but the model adds to the first token of a long prompt, with a fake worker.

usage: python -m bench.first_token [--quick] [--tokens N] [--rounds N] [--gap-ms N]

Measures core, wire, front-end, gRPC and the Python client, all on this host, as `bench/gpu.py` asks for first
tokens: one request at a time over a stream of its own, its prompt given as ids, one token wanted. A round
asks for a short prompt, a long one that nobody knows, and that one again, each after a gap in which all
processes sleep. One JSON object last, medians in milliseconds: to the first token, and its parts: until the
worker begins (`there`), the fake worker's own step (`worker`), and back. `added` is both ways together.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baton_client import AsyncClient, BatonError, Delta, Sampling, Stack, StackOptions
from baton_client.stack import demo_model
from baton_sim.slot_table import STEP_LOG

_SHORT_TOKENS = 16
_BLOCK_SIZE = 64
_VOCABULARY = 10_000
_WARM_UP = 3  # rounds that do not count


@dataclass(frozen=True, slots=True)
class Answer:
    """One request, told apart by its seed: when it was started, and when its token came."""

    kind: str
    seed: int
    started_ns: int
    came_ns: int


def main() -> int:
    """Measure and print; return the exit code."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        step_log = Path(folder) / "steps"
        try:
            with Stack.start(_stack_options(arguments.tokens, step_log)) as stack:
                answers = asyncio.run(_ask(stack.address, arguments))
                stack.check()
        except BatonError as error:
            print(f"first_token: {error.message}", file=sys.stderr)
            return 1
        steps = {int(record["seed"]): record for record in np.fromfile(step_log, STEP_LOG)}
    results: dict[str, object] = {
        "bench": "first_token",
        "tokens": arguments.tokens,
        "gap_ms": arguments.gap_ms,
    }
    for kind in ("short", "cold", "hit"):
        results[kind] = _summary([answer for answer in answers if answer.kind == kind], steps)
    print(json.dumps(results))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time to the first token of a long prompt, fake worker.")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--tokens", type=int, default=8000, help="of the long prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--gap-ms", type=float, default=20.0, help="before a request (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 3
    return arguments


def _stack_options(tokens: int, step_log: Path) -> StackOptions:
    model = str(demo_model())  # for its tokenizer
    blocks = 64 * (1 + tokens // _BLOCK_SIZE)  # as many long prompts stay known
    return StackOptions(
        model=model,
        worker_command=("baton_sim.fake_worker", "--model", model),
        worker_args=(
            *("--max-model-len", str(tokens + _BLOCK_SIZE), "--max-num-batched-tokens", str(2 * tokens)),
            *("--kvcache-block-size", str(_BLOCK_SIZE), "--num-kvcache-blocks", str(blocks)),
            *("--vocab-size", str(_VOCABULARY), "--step-log", str(step_log)),
        ),
    )


async def _ask(address: str, arguments: argparse.Namespace) -> list[Answer]:
    """All rounds."""
    draw = random.Random(0)

    def prompt(tokens: int) -> list[int]:
        return [draw.randrange(_VOCABULARY) for _ in range(tokens)]

    answers: list[Answer] = []
    for _ in range(_WARM_UP + arguments.rounds):
        short, long = prompt(_SHORT_TOKENS), prompt(arguments.tokens)
        for kind, ids in (("short", short), ("cold", long), ("hit", long)):
            await asyncio.sleep(arguments.gap_ms / 1e3)
            answers.append(await _one(address, kind, ids, seed=len(answers)))
    return answers[3 * _WARM_UP :]


async def _one(address: str, kind: str, ids: list[int], seed: int) -> Answer:
    sampling = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True, seed=seed)
    came_ns = 0
    async with AsyncClient(address) as client:
        await client.model()
        async with client.mux() as mux:
            started_ns = time.monotonic_ns()
            mux.start(0, ids, sampling)
            mux.done()
            async for batch in mux:
                if came_ns == 0 and isinstance(batch[0][1], Delta):
                    came_ns = time.monotonic_ns()
    assert came_ns, "a request has a token"
    return Answer(kind, seed, started_ns, came_ns)


def _summary(answers: list[Answer], steps: dict[int, np.void]) -> dict[str, float]:
    there, worker, back = [], [], []
    for answer in answers:
        began_ns, at_ns = (int(steps[answer.seed][name]) for name in ("began_ns", "at_ns"))
        there.append(began_ns - answer.started_ns)
        worker.append(at_ns - began_ns)
        back.append(answer.came_ns - at_ns)
    added = [a + b for a, b in zip(there, back, strict=True)]
    whole = [a + b for a, b in zip(added, worker, strict=True)]
    parts = {"first_token": whole, "there": there, "worker": worker, "back": back, "added": added}
    figures = {f"{name}_ms": round(statistics.median(ns) / 1e6, 3) for name, ns in parts.items()}
    return {**figures, "added_best_ms": round(min(added) / 1e6, 3)}


if __name__ == "__main__":
    sys.exit(main())
