"""Time of each GPU kernel at the sizes of two models, beside what the memory or the library allows.

usage: python -m bench.kernels [--compile] [PART ...]        (default: every part)

Every time is of launches in a captured CUDA graph that go round over many sets of inputs, more than the cache
holds; medians, microseconds. Ceilings first, JSON last. --compile launches everything once and measures
nothing: several such processes fill the compiler's cache side by side.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear as library_linear

from baton_kernels import advance, sampler
from baton_kernels.decode_attention import decode_attention
from baton_kernels.decode_plan import CHUNK, DecodeWork, plan
from baton_kernels.linear import MAX_ROWS, LinearTile, linear, linear_tile
from baton_kernels.prefill_attention import PromptChunk, plan_prefill, prefill_attention
from baton_kernels.qk_rope_kv import qk_rope_kv
from baton_kernels.rms_norm import add_rms_norm
from baton_kernels.silu_mul import silu_mul
from baton_kernels.tiles import DecodeTile, PrefillTile

EPS = 1e-6
VOCABULARY = 151936
Measures = dict[str, Any]
Launch = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's layer."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SMALL = Shape(1024, 3072, 16, 8, 128, 28)  # Qwen3-0.6B
LARGE = Shape(4096, 12288, 32, 8, 128, 36)  # Qwen3-8B


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


class Clock:
    """Times launches, or only makes them."""

    def __init__(self, compile_only: bool) -> None:
        self.compile_only = compile_only

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


class Pages:
    """A cache per layer, and tables of blocks in random order."""

    def __init__(self, shape: Shape, lengths: list[int], block_size: int, layers: int) -> None:
        width = -(-max(lengths) // block_size)
        blocks = width * len(lengths)
        size = (blocks, shape.kv_heads, block_size, shape.head_dim)
        self.layers = [(bf16(*size), bf16(*size)) for _ in range(layers)]
        self.table = torch.randperm(blocks, device="cuda").to(torch.int32).view(len(lengths), width)
        self.block_size, self.bytes = block_size, sum(lengths) * shape.kv_heads * shape.head_dim * 4


def planned(
    shape: Shape, pages: Pages, lengths: list[int], chunk: int | None = None, tile: DecodeTile | None = None
) -> DecodeWork:
    """The work list of a step."""
    sizes = (shape.heads, shape.kv_heads, shape.head_dim, pages.block_size)
    work = DecodeWork.make(len(lengths), *sizes, max(lengths), "cuda", chunk, tile)
    work.seen.copy_(torch.tensor(lengths))
    work.slots.copy_(torch.arange(len(lengths)))
    plan(work, len(lengths), pages.table)
    return work


def ceilings() -> Measures:
    """TB/s of a copy, TFLOP/s of a matrix product."""
    x = bf16(1 << 30)
    y = torch.empty_like(x)
    copy_ms = triton.testing.do_bench(lambda: y.copy_(x), return_mode="median")
    a, b = bf16(8192, 8192), bf16(8192, 8192)
    product_ms = triton.testing.do_bench(lambda: a @ b, return_mode="median")
    return {
        "copy_tb_s": round(4 * x.numel() / copy_ms / 1e9, 2),
        "matmul_tflop_s": round(2 * 8192**3 / product_ms / 1e9),
    }


DECODE_TILES = {
    16: [DecodeTile(64, 2, 3, 4), DecodeTile(64, 2, 5, 3), DecodeTile(32, 2, 5, 4), DecodeTile(32, 2, 7, 4)],
    64: [DecodeTile(32, 2, 5, 4, True), DecodeTile(32, 2, 4, 6, True), DecodeTile(64, 4, 4, 4, True)],
}


def decode(clock: Clock) -> list[Measures]:
    """Attention of a decode step: tiles, block sizes, equal ranges or chunks, batches."""
    cases: list[tuple[Shape, int, int, int | None, DecodeTile | None]] = []
    for size, tiles in DECODE_TILES.items():
        cases += [(SMALL, batch, size, None, tile) for batch in (8, 64, 256) for tile in tiles]
    cases += [(shape, batch, 64, None, None) for shape in (SMALL, LARGE) for batch in (1, 8, 64, 128, 256)]
    cases += [(SMALL, batch, 64, CHUNK, None) for batch in (1, 8, 64, 256)]
    results: list[Measures] = []
    for shape, batch, block_size, chunk, tile in cases:
        lengths = bench_lengths(batch)
        pages = Pages(shape, lengths, block_size, max(4, min(28, int(6e8 / (sum(lengths) * 4096)))))
        q, work = bf16(batch, shape.heads, shape.head_dim), planned(shape, pages, lengths, chunk, tile)
        attend = partial(decode_attention, block_table=pages.table, work=work, scale=0.1)
        us = clock.graph_us([partial(attend, q, *layer, out=torch.empty_like(q)) for layer in pages.layers])
        show(
            results,
            heads=shape.heads,
            batch=batch,
            block_size=block_size,
            chunk=chunk,
            tile=str(tile),
            us=us,
            tb_s=round(pages.bytes / max(us, 1) / 1e6, 2),
        )
    return results


PREFILL_TILES = {
    16: [PrefillTile(128, 64, 8, 3), PrefillTile(64, 64, 4, 3), PrefillTile(128, 128, 8, 2)],
    64: [PrefillTile(128, 64, 8, 2, True, 128), PrefillTile(64, 64, 4, 3, True)],
    128: [PrefillTile(128, 64, 8, 2, True, 128), PrefillTile(128, 128, 8, 2, True)],
}


def prefill(clock: Clock) -> list[Measures]:
    """A prompt of 8,000 tokens: cold, and its last 16 after a prefix hit."""
    results: list[Measures] = []
    cold, hit = (0, 8000), (7984, 16)
    cases = [(SMALL, cold, size, tile) for size, tiles in PREFILL_TILES.items() for tile in tiles]
    cases += [(LARGE, cold, size, tile) for size, tiles in PREFILL_TILES.items() for tile in tiles[:1]]
    cases += [(shape, hit, size, PREFILL_TILES[size][0]) for shape in (SMALL, LARGE) for size in (16, 64)]
    for shape, (start, rows), block_size, tile in cases:
        pages = Pages(shape, [start + rows], block_size, 4)
        q = bf16(rows, shape.heads, shape.head_dim)
        heads = (shape.heads, shape.kv_heads, shape.head_dim)
        chunks = [PromptChunk(0, 0, rows, start)]
        work = plan_prefill(chunks, *heads, q.device, block_size=block_size, tile=tile)
        attend = partial(prefill_attention, block_table=pages.table, work=work, scale=0.1)
        us = clock.graph_us(
            [partial(attend, q, *layer, out=torch.empty_like(q)) for layer in pages.layers], 5
        )
        flop = 4 * (rows * start + rows * rows / 2) * shape.heads * shape.head_dim
        show(
            results,
            heads=shape.heads,
            start=start,
            rows=rows,
            block_size=block_size,
            tile=str(tile),
            us=us,
            tflop_s=round(flop / max(us, 1) / 1e6),
        )
    return results


class Table:
    """The slot table's columns, and a step's rows."""

    def __init__(self, slots: int) -> None:
        def numbers(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((slots, *shape), value, dtype=dtype, device="cuda")

        self.block_table = numbers(1, 256, dtype=torch.int32)
        self.length, self.min_length, self.max_length = numbers(1000), numbers(0), numbers(1 << 30)
        self.occupancy, self.mode, self.admitted = numbers(2), numbers(0), numbers(7)
        self.last_token, self.stop_ids = numbers(5), numbers(-1, 16)
        self.seed, self.top_k = torch.arange(slots, device="cuda"), numbers(0)
        self.temperature = numbers(0, dtype=torch.float32)
        self.top_p, self.min_p = numbers(1, dtype=torch.float32), numbers(0, dtype=torch.float32)
        self.tokens, self.positions, self.places = (numbers(0, dtype=torch.int32) for _ in range(3))
        self.seen, self.slots, self.sampled = (numbers(0, dtype=torch.int32) for _ in range(3))


def row_kernels(rows: int) -> dict[str, Launch]:
    """Kernels on rows, and those of the step's ends."""
    s, table, pages = SMALL, Table(rows), Pages(SMALL, [1000] * rows, 64, 0)
    cache, head = bf16(rows * 4, s.kv_heads, 16, s.head_dim), bf16(s.head_dim)
    rotary = torch.randn(4096, 2, s.head_dim, device="cuda")
    places = torch.arange(rows, device="cuda", dtype=torch.int32) * 40
    named = torch.zeros(rows, dtype=torch.int8, device="cuda")
    ring = torch.zeros(8, advance.HEADER + 2 * rows, dtype=torch.int32, device="cuda")
    steps = torch.zeros(1, dtype=torch.int64, device="cuda")
    x, residual, weight = bf16(rows, s.hidden), bf16(rows, s.hidden), bf16(s.hidden)
    return {
        "add_rms_norm": partial(add_rms_norm, x, residual, weight, EPS),
        "silu_mul": partial(silu_mul, bf16(rows, 2 * s.intermediate)),
        "qk_rope_kv": partial(
            qk_rope_kv, bf16(rows, s.qkv), head, head, EPS, rotary, places, places, cache, cache
        ),
        "plan": partial(plan, planned(s, pages, [1000] * rows), rows, pages.table),
        "begin": partial(advance.begin, table, table, rows, 16, named),
        "advance": partial(advance.advance, table, table.sampled, ring, steps),
    }


def small(clock: Clock) -> list[Measures]:
    """The kernels on rows, one row to many."""
    results: list[Measures] = []
    for rows in (1, 8, 64, 256):
        for name, kernel in row_kernels(rows).items():
            show(results, kernel=name, rows=rows, us=clock.graph_us([kernel] * 20))
    return results


def sampling(clock: Clock) -> list[Measures]:
    """The sampler: greedy, random, with filters; peaked logits as a trained model has, and flat ones."""
    results: list[Measures] = []
    for rows in (1, 8, 64, 256):
        table = Table(rows)
        flat = [bf16(rows, VOCABULARY) for _ in range(4)]
        peaked = [x**3 / 4 for x in flat]
        slots = torch.arange(rows, device="cuda", dtype=torch.int32)
        work = sampler.SampleWork.make(rows, VOCABULARY, "cuda")
        for temperature, top_k, top_p in ((0.0, 0, 1.0), (0.6, 0, 1.0), (0.6, 20, 0.95), (1.0, 0, 0.9)):
            table.temperature.fill_(temperature)
            table.top_k.fill_(top_k)
            table.top_p.fill_(top_p)
            for name, sets in (("flat", flat), ("peaked", peaked)):
                given = (slots, table, work, table.sampled)
                us = clock.graph_us([partial(sampler.sample, x, *given) for x in sets], 10)
                show(
                    results, logits=name, rows=rows, temperature=temperature, top_k=top_k, top_p=top_p, us=us
                )
    return results


def linears(clock: Clock) -> list[Measures]:
    """Skinny products, ours in several tiles beside the library's."""
    results: list[Measures] = []
    shapes = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (6144, 4096), (4096, 12288)]
    for outputs, inputs in shapes:
        weights = [bf16(outputs, inputs) for _ in range(max(2, int(3e8 / (outputs * inputs * 2))))]
        for rows in range(1, MAX_ROWS + 1):
            x, out = bf16(rows, inputs), bf16(rows, outputs)
            usual = linear_tile(inputs)
            others = [LinearTile(8, 1024, 4), LinearTile(4, 1024, 2)]
            times = {"library": clock.graph_us([partial(library_linear, x, w) for w in weights], 8)}
            times["usual"] = clock.graph_us([partial(linear, x, w, out=out) for w in weights], 8)
            times["pdl"] = clock.graph_us([partial(linear, x, w, out=out, pdl=True) for w in weights], 8)
            for tile in others:
                name = f"{tile.outputs}x{tile.inputs}w{tile.warps}"
                given: dict[str, Any] = {"out": out, "tile": tile}
                times[name] = clock.graph_us([partial(linear, x, w, **given) for w in weights], 8)
            show(results, outputs=outputs, inputs=inputs, rows=rows, tile=str(usual), us=times)
    return results


class Layer:
    """A layer's weights, and its part of a decode step in two ways."""

    def __init__(self, s: Shape) -> None:
        self.qkv, self.o = bf16(s.qkv, s.hidden) / 32, bf16(s.hidden, s.heads * s.head_dim) / 45
        self.gate_up, self.down = bf16(2 * s.intermediate, s.hidden) / 32, bf16(s.hidden, s.intermediate) / 55
        self.norm, self.head_norm = bf16(s.hidden), bf16(s.head_dim)

    def fused(
        self, x: Tensor, attend: Callable[..., Tensor], cache: tuple[Tensor, Tensor], pdl: bool
    ) -> Tensor:
        """Our skinny products, with activation and residuals in them."""
        qkv = linear(x, self.qkv, pdl=pdl)
        x = linear(attend(qkv, self.head_norm, cache, pdl=pdl), self.o, residual=x, pdl=pdl)
        gate_up = linear(x, self.gate_up, pdl=pdl)
        return linear(gate_up, self.down, silu=True, rms_of=(x, EPS), residual=x, pdl=pdl)

    def library(
        self, x: Tensor, residual: Tensor, attend: Callable[..., Tensor], cache: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The library's products."""
        x, residual = add_rms_norm(x, residual, self.norm, EPS)
        x = library_linear(attend(library_linear(x, self.qkv), self.head_norm, cache), self.o)
        x, residual = add_rms_norm(x, residual, self.norm, EPS)
        return library_linear(silu_mul(library_linear(x, self.gate_up)), self.down), residual


class Chain:
    """All layers of a decode step of the small model, without its head."""

    def __init__(self, layers: list[Layer], batch: int, block_size: int) -> None:
        lengths = bench_lengths(batch)
        self.layers = layers
        self.pages = Pages(SMALL, lengths, block_size, SMALL.layers)
        self.work = planned(SMALL, self.pages, lengths)
        self.places = torch.arange(batch, device="cuda", dtype=torch.int32) * 40
        self.rotary = torch.randn(4096, 2, SMALL.head_dim, device="cuda")
        self.x = bf16(batch, SMALL.hidden)

    def attend(self, qkv: Tensor, norm: Tensor, cache: tuple[Tensor, Tensor], pdl: bool = False) -> Tensor:
        keys, values = cache
        places = (self.places, self.places)
        q = qk_rope_kv(qkv, norm, norm, EPS, self.rotary, *places, keys, values, pdl=pdl)
        return decode_attention(q, keys, values, self.pages.table, self.work, 0.088, pdl=pdl).flatten(1)

    def fused(self, pdl: bool) -> Tensor:
        x = self.x
        for layer, cache in zip(self.layers, self.pages.layers, strict=True):
            x = layer.fused(x, self.attend, cache, pdl)
        return x

    def library(self) -> Tensor:
        x, residual = self.x, torch.zeros_like(self.x)
        for layer, cache in zip(self.layers, self.pages.layers, strict=True):
            x, residual = layer.library(x, residual, self.attend, cache)
        return x


def chain(clock: Clock) -> list[Measures]:
    """The layers of a decode step, skinny products fused, or the library's."""
    results: list[Measures] = []
    layers = [Layer(SMALL) for _ in range(SMALL.layers)]
    for batch in (1, 2, 4, 8, 16, 64, 256):
        step = Chain(layers, batch, 64)
        ways: dict[str, Launch] = {"library": step.library}
        if batch <= MAX_ROWS:
            ways |= {"fused": partial(step.fused, False), "fused_pdl": partial(step.fused, True)}
        for name, way in ways.items():
            show(results, batch=batch, way=name, us=clock.graph_us([way]))
    return results


PARTS: dict[str, Callable[[Clock], list[Measures]]] = {
    "chain": chain,
    "decode": decode,
    "small": small,
    "linear": linears,
    "prefill": prefill,
    "sampler": sampling,
}


def main() -> None:
    """Measures the parts asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Time of each GPU kernel.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--compile", action="store_true", help="launch once, measure nothing")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.kernels needs a CUDA device")
    report: Measures = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if not asked.compile:
        report["ceilings"] = ceilings()
        print(report["ceilings"], flush=True)
    for part in asked.parts or PARTS:
        report[part] = PARTS[part](Clock(asked.compile))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
