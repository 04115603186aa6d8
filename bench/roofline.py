"""What the machine allows: rates measured, and from them the least time that each figure can take.

usage: python -m bench.roofline         prints the measured rates as JSON; needs a CUDA device
"""

import argparse
import json
import random
from typing import Any

from bench.figures import Scale
from bench.shapes import Shape


def measure_rates() -> dict[str, float]:
    """Copy bandwidth, TB/s (bytes read and written), and bf16 products, TFLOP/s, of the CUDA device."""
    import torch

    a = torch.empty(1 << 30, dtype=torch.int32, device="cuda")
    b = torch.empty_like(a)
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")

    def timed(call: Any, repeats: int) -> float:
        call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / repeats / 1e3

    return {
        "copy_tb_s": round(2 * a.nbytes / timed(lambda: b.copy_(a), 5) / 1e12, 3),
        "bf16_tflop_s": round(2 * 8192**3 / timed(lambda: x @ x, 10) / 1e12, 1),
    }


def limits(shape: Shape, scale: Scale, rates: dict[str, float]) -> dict[str, float]:
    """Figures of an engine that only moves the bytes and does the sums that it must, at full rate."""
    copy, products = rates["copy_tb_s"] * 1e12, rates["bf16_tflop_s"] * 1e12
    weights = 2.0 * (shape.layer_weights + shape.vocabulary * shape.hidden)  # operations of a row
    low, high = scale.decode
    seen = scale.decode_prompt + (low + high) / 2

    def step_s(rows: float, positions: float) -> float:
        reads = shape.step_bytes / copy
        return max(reads, rows * weights / products) + positions * shape.position_bytes / copy

    figures = {f"tpot_ms_b{b}": step_s(b, b * seen) * 1e3 for b in scale.batches}
    head_s = shape.step_bytes / copy
    figures["ttft_long_cold_ms"] = max(head_s, shape.prompt_flop(scale.long_prompt) / products) * 1e3
    figures["ttft_long_hit_ms"] = (head_s + scale.long_prompt * shape.position_bytes / copy) * 1e3
    figures["throughput_tok_s"] = _throughput(shape, scale, products, step_s)
    return {name: round(value, 4) for name, value in figures.items()}


def _throughput(shape: Shape, scale: Scale, products: float, step_s: Any) -> float:
    """All prompts first, then steps of whoever is not through yet."""
    random.seed(0)
    prompts = []
    for _ in range(scale.requests):
        prompts.append(random.randint(*scale.lengths))
        for _ in range(prompts[-1]):
            random.randint(0, scale.ids)
    outputs = [random.randint(*scale.lengths) for _ in range(scale.requests)]
    seconds = sum(shape.prompt_flop(prompt) for prompt in prompts) / products
    for step in range(1, max(outputs)):
        seen = [prompt + step for prompt, output in zip(prompts, outputs, strict=True) if output > step]
        seconds += step_s(len(seen), sum(seen))
    return sum(outputs) / seconds


def main() -> None:
    """Measures the device."""
    argparse.ArgumentParser(
        prog="python -m bench.roofline",
        description="Rates of the CUDA device, as JSON: copies in TB/s, bf16 products in TFLOP/s.",
    ).parse_args()
    print(json.dumps(measure_rates()))


if __name__ == "__main__":
    main()
