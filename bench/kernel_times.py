"""Time of each GPU kernel at the sizes of two models, beside what the memory or the library allows.

usage: python -m bench.kernel_times [--compile] [--quick] [PART ...]        (default: every part)

Every time is of launches in a captured CUDA graph that go round over many sets of inputs, more than the cache
holds; medians, microseconds. Ceilings, which are means, come first, JSON last. --compile launches everything
once and measures nothing: several such processes fill the compiler's cache side by side. --quick measures
products and layers (`linear chain`) of the small model at three numbers of rows, compilation and all within a
minute.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor

from baton_kernels import advance, sampler
from baton_kernels.decode_attention import decode_attention
from baton_kernels.decode_plan import CHUNK, DecodeWork, plan
from baton_kernels.prefill_attention import PromptChunk, plan_prefill, prefill_attention
from baton_kernels.qk_rope_kv import qk_rope_kv
from baton_kernels.rms_norm import add_rms_norm
from baton_kernels.silu_mul import silu_mul
from baton_kernels.tiles import DecodeTile, PrefillTile
from bench import products
from bench.clock import EPS, LARGE, SMALL, Clock, Launch, Measures, bench_lengths, bf16, show
from bench.roofline import measure_rates
from bench.shapes import Shape

VOCABULARY = 151936


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
    rates = measure_rates()
    return {"copy_tb_s": rates["copy_tb_s"], "matmul_tflop_s": rates["bf16_tflop_s"]}


DECODE_TILES = {
    16: [DecodeTile(64, 2, 3, 4), DecodeTile(32, 2, 5, 4), DecodeTile(16, 1, 5, 8, True)],
    64: [DecodeTile(32, 2, 5, 4, True), DecodeTile(16, 1, 5, 8, True), DecodeTile(64, 4, 4, 4, True)],
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


PARTS: dict[str, Callable[[Clock], list[Measures]]] = {
    "chain": products.chain,
    "decode": decode,
    "small": small,
    "linear": products.linears,
    "prefill": prefill,
    "sampler": sampling,
}


def main() -> None:
    """Measures the parts asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernel_times", description="Time of each GPU kernel."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--compile", action="store_true", help="launch once, measure nothing")
    parser.add_argument("--quick", action="store_true", help="fewer cases of linear and chain")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.kernel_times needs a CUDA device")
    report: Measures = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if not asked.compile:
        report["ceilings"] = ceilings()
        print(report["ceilings"], flush=True)
    for part in asked.parts or PARTS:
        report[part] = PARTS[part](Clock(asked.compile, asked.quick))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
