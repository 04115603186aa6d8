"""A benchmark as people write them for nano-vLLM: random ids of random lengths, one set of parameters each.

usage: python offline_bench.py REQUESTS LONGEST   (theirs: 256 and 1024)
"""

import random
import sys
import time
from pathlib import Path

from baton_client import LLM, SamplingParams


def main(requests: int, longest: int) -> None:
    """Measure the model in the usual place."""
    random.seed(0)
    llm = LLM(str(Path("~/huggingface/Qwen3-0.6B/").expanduser()), enforce_eager=False, max_model_len=4096)
    shortest = min(100, longest)
    prompts = [
        [random.randint(0, 10_000) for _ in range(random.randint(shortest, longest))] for _ in range(requests)
    ]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=random.randint(shortest, longest))
        for _ in range(requests)
    ]
    llm.generate(["Benchmark: "], SamplingParams())
    started = time.time()
    llm.generate(prompts, params, use_tqdm=False)
    elapsed_s = time.time() - started
    tokens = sum(each.max_tokens or 0 for each in params)
    print(f"Total: {tokens}tok, Time: {elapsed_s:.2f}s, Throughput: {tokens / elapsed_s:.2f}tok/s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
