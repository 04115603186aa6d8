"""Drives a runner in this process: by hand-made plans, or by the production scheduler, results late."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
import xxhash

from baton_kernels import reference
from baton_wire.frontend import Submit
from baton_wire.plan import ADMISSION, APPEND, CHUNK, SAMPLING, Mode, Plan
from baton_wire.result import End, Result
from gpu_worker import build
from gpu_worker.config import parse
from gpu_worker.layers.linear import GateUp
from gpu_worker.limits import Limits as WorkerLimits
from gpu_worker.models.qwen3 import Qwen3Decoder
from gpu_worker.runner import Runner
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.sequence import Sequence
from scheduler_svc.core.step import Limits


class Executor(Protocol):
    """What plans are given to: a runner, or several side by side."""

    @property
    def limits(self) -> WorkerLimits: ...

    def reset(self) -> None: ...

    def execute(self, plan: Plan) -> Result: ...


def load(folder: Path, *arguments: str) -> build.Loaded:
    """A checkpoint as the worker loads it."""
    return build.load_model(parse(["--model", str(folder), *arguments]))


def load_folded(folder: Path, *arguments: str) -> build.Loaded:
    """The same with norms folded into products, and gate and up in turns where they can be, as on a GPU."""
    with (
        mock.patch.object(Qwen3Decoder, "folds", lambda decoder: not decoder.is_biased),
        mock.patch.object(GateUp, "takes_turns", lambda layer: layer.size % reference.TURNS == 0),
    ):
        return load(folder, *arguments)


def runner(loaded: build.Loaded, **options: int) -> "RecordingRunner":
    """A runner of a loaded model; options are arguments of the command line, with underscores."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    made = build.make_runner(parse(["--model", "unused", *arguments]), loaded)
    assert isinstance(made, Runner), "the CPU's"
    return RecordingRunner(made.model, made.attention, made.cache, made.rotary, made.limits)


class RecordingRunner(Runner):
    """Remembers a digest of every row of logits, by seed (each request has its own) and position."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.digests: dict[tuple[int, int], int] = {}

    def _logits(self, step, hidden):
        logits = super()._logits(step, hidden)
        seeds, positions = self.slots.seed[step.slots].tolist(), self.slots.length[step.slots].tolist()
        for row, key in zip(logits, zip(seeds, positions, strict=True), strict=True):
            digest = xxhash.xxh3_64_intdigest(row.numpy().tobytes())
            assert self.digests.setdefault(key, digest) == digest, "recomputed, and not the same bits"
        return logits


def sampling(temperature=0.0, top_p=1.0, min_p=0.0, top_k=0, seed=0):
    return np.array((seed, temperature, top_p, min_p, top_k), SAMPLING)


@dataclass
class Request:
    prompt: list[int]
    max_tokens: int
    sampling: np.ndarray = field(default_factory=sampling)
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0

    def submit(self, handle: int) -> Submit:
        prompt = np.array(self.prompt, np.int32)
        return Submit(handle, prompt, self.max_tokens, self.min_tokens, self.sampling, self.stop_ids)


@dataclass
class Run:
    """What came out of a run."""

    tokens: list[list[int]]
    ends: list[End | None]
    preemptions: int
    cached: int
    known: int  # requests whose whole prompt was cached
    steps: int


def generate(made: Executor, requests: Iterable[Request], *, depth: int = 2, stagger: int = 0) -> Run:
    """Runs requests through the production scheduler; every result is applied `depth` - 1 plans late.

    stagger: a request arrives every so many steps, 0 for all at once.
    """
    limits = made.limits
    scheduler = Scheduler(
        Limits(
            max_slots=limits.max_slots,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            max_model_len=limits.max_model_len,
            max_tokens_per_step=limits.max_tokens_per_step,
            row_multiple=limits.row_multiple,
        )
    )
    made.reset()
    sequences = [Sequence.of(i, request.submit(i)) for i, request in enumerate(requests)]
    lengths = [len(s.tokens) for s in sequences]
    arriving = deque(sequences)
    run = Run([[] for _ in sequences], [None] * len(sequences), 0, 0, 0, 0)
    results: deque[Result] = deque()
    while arriving or scheduler.load or results:
        while arriving and (not stagger or run.steps % stagger == 0 or not scheduler.load):
            scheduler.add(arriving.popleft())
            if stagger:
                break
        plan = scheduler.schedule() if len(results) < depth else None
        if plan is not None:
            run.steps += 1
            results.append(Result.decode(made.execute(Plan.decode(plan.encode())).encode()))
        else:
            outcome = scheduler.apply(results.popleft())
            for owner, token in zip(outcome.owners.tolist(), outcome.tokens.tolist(), strict=True):
                run.tokens[owner].append(token)
            for sequence, end in outcome.ended:
                run.ends[sequence.owner] = end
    run.preemptions = sum(s.preemptions for s in sequences)
    run.cached = sum(max(0, s.cached) for s in sequences)
    run.known = sum(s.cached == length for s, length in zip(sequences, lengths, strict=True))
    return run


class Hand:
    """Plans by hand: one call is one step. Blocks are handed out in order and never come back."""

    def __init__(self, made: Executor) -> None:
        self.runner = made
        made.reset()
        self.step = 0
        self.next_block = 0
        self.bound = 0

    def plan(self, **columns) -> Result:
        """Executes the next plan with these columns, by way of the wire."""
        self.step += 1
        multiple = self.runner.limits.row_multiple
        bucket = -(-self.bound // multiple) * multiple
        plan = Plan(step=self.step, row_bound=self.bound, bucket=bucket, **columns)
        return Result.decode(self.runner.execute(Plan.decode(plan.encode())).encode())

    def admit(self, slot: int, request: Request, *, mode: Mode = Mode.AUTO, **columns) -> Result:
        """Admits a request and computes its whole prompt; the other columns go with it."""
        length = len(request.prompt)
        admission = np.zeros(1, ADMISSION)
        admission["slot"], admission["mode"], admission["stops"] = slot, mode, len(request.stop_ids)
        admission["max_length"] = length + request.max_tokens
        admission["min_length"] = length + request.min_tokens
        admission["sampling"] = request.sampling
        count = -(-(length + request.max_tokens) // self.runner.limits.block_size)
        blocks = range(self.next_block, self.next_block + count)
        self.next_block += count
        self.bound = max(self.bound, slot + 1)
        return self.plan(
            admissions=admission,
            stop_ids=np.array(request.stop_ids, np.int32),
            appends=np.array([(slot, block) for block in blocks], APPEND),
            chunks=np.array([(slot, 1, 0, length)], CHUNK),
            chunk_tokens=np.array(request.prompt, np.int32),
            **columns,
        )


def known(slot: int, blocks: Iterable[int], request: Request, **more: int) -> dict[str, Any]:
    """Columns that admit a request whose prompt these blocks hold whole; `more`: of its chunk."""
    length = len(request.prompt)
    admission = np.zeros(1, ADMISSION)
    admission["slot"], admission["cached"] = slot, length
    admission["max_length"], admission["sampling"] = length + request.max_tokens, request.sampling
    chunk = {"slot": slot, "last": 1, "start": length - 1, "count": 1} | more
    start, count = chunk["start"], chunk["count"]
    return {
        "admissions": admission,
        "appends": np.array([(slot, block) for block in blocks], APPEND),
        "chunks": np.array([(slot, chunk["last"], start, count)], CHUNK),
        "chunk_tokens": np.resize(np.array(request.prompt[start : start + count] or [0], np.int32), count),
    }


def poison(made: Runner, *blocks: int) -> None:
    """Fills blocks of the cache with what a broken owner leaves behind."""
    with torch.inference_mode():
        made.cache[:, list(blocks)] = torch.nan
