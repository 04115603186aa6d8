"""The CUDA runner, its kernels interpreted, beside the CPU's: same plans, same tokens, ends and hashes."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from baton_kernels import prefill_attention, reference, sampler
from baton_wire.plan import APPEND, CHUNK, Mode, Plan
from baton_wire.result import End
from gpu_worker.attention import AttentionShape
from gpu_worker.attention.triton_backend import TritonAttention
from gpu_worker.cuda import mixed, prompt_rows
from gpu_worker.cuda.runner import RING, CudaRunner
from gpu_worker.errors import PlanError
from gpu_worker.models.qwen3 import Qwen3
from tests.support.random_checkpoints import Shape, write_checkpoint
from tests.worker import drive

OPTIONS = {"max_num_seqs": 5, "num_kvcache_blocks": 5, "max_num_batched_tokens": 40, "kvcache_block_size": 16}


class Event:
    """A device that is through at once."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.001


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, small in (("_TILE", 256), ("_GROUP", 16), ("_NEAR_GROUPS", 16)):
        monkeypatch.setattr(sampler, name, small)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return drive.load_folded(
        write_checkpoint(tmp_path_factory.mktemp("model"), Shape(), with_tokenizer=False)
    )


def make_pair(loaded, **options):
    """(the CUDA runner, the CPU's), alike."""
    host = drive.runner(loaded, **OPTIONS | options)
    c, limits = loaded.config, replace(host.limits, row_multiple=1)
    shape = AttentionShape(c.heads, c.kv_heads, c.head_dim, limits.block_size)
    attention = TritonAttention(shape, loaded.dtype, torch.device("cpu"))
    rotary = reference.rotary_table(limits.max_model_len, c.head_dim, c.rope_theta)
    cache = attention.cache(c.layers, limits.num_blocks).fill_(torch.nan)
    cache[:, 1] = torch.finfo(cache.dtype).max  # values are finite wherever tiles reach
    made = CudaRunner(loaded.model, attention, cache, rotary, limits, vocabulary=c.vocab_size)
    made.prepare(graphs=False)
    made.reset()
    return made, host


@pytest.fixture
def pair(loaded, device):
    return make_pair(loaded)


class Both:
    """Gives every plan to both, and compares."""

    def __init__(self, pair: Any) -> None:
        self.pair, self.limits = pair, pair[0].limits
        self.prompts: list[int] = []  # chunks in each plan

    def reset(self):
        for runner in self.pair:
            runner.reset()

    def execute(self, plan):
        ours, expected = (runner.execute(plan) for runner in self.pair)
        assert ours.tokens.tolist() == expected.tokens.tolist(), plan
        assert sorted(ours.ends.tolist()) == sorted(expected.ends.tolist()), plan  # in any order
        assert ours.state_hash == expected.state_hash, plan
        self.prompts.append(len(plan.chunks))
        return ours


def note_mixed(both, monkeypatch):
    """A list that gets the decode rows of every pass over both kinds of rows."""
    mixer, together = both.pair[0]._mixer, []
    run = mixer.run

    def note(rows, *more):
        together.append(rows)
        run(rows, *more)

    monkeypatch.setattr(mixer, "run", note)
    return together


def requests(count):
    return [
        drive.Request(
            [(7 * i + j * j) % 300 for j in range(5 + 9 * i)],
            max_tokens=3 + 2 * i,
            sampling=drive.sampling(temperature=0.7 * (i % 2), top_k=5 * (i % 3), seed=i),
            stop_ids=tuple(range(2 * i)),
            min_tokens=i,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("captured", [False, True])
def test_requests_that_come_and_go(pair, captured, monkeypatch):
    """Chunked prompts, decodes beside them, prefix hits, preemption; passes of captured sizes and others.

    What is of no captured size is no pass together with decode rows either.
    """
    both = Both(pair)
    if not captured:
        pair[0]._prefiller.sizes.clear()
    together = note_mixed(both, monkeypatch)
    work = requests(5)
    for request in work:
        request.max_tokens = 12  # until they need another block, and there is none
    work += work[4:]  # its prefix is cached by then …
    short = work[4].prompt[:32]  # … and all of this one's
    work.append(drive.Request(short, 12, drive.sampling(temperature=0.7, seed=9)))
    run = drive.generate(both, work)
    assert all(end is not None for end in run.ends)
    assert run.preemptions and run.cached and run.known and max(both.prompts) > 1
    assert bool(together) == captured


def test_tiles_that_are_described_in_passes_with_spare_rows(loaded, device, monkeypatch):
    """Blocks that hold whole tiles, and fewer decode rows than slots."""
    monkeypatch.setattr(mixed, "_BUCKETS", (2, 4))
    both = Both(make_pair(loaded, kvcache_block_size=32, num_kvcache_blocks=9))
    assert both.pair[0].decoder._space.described(4)
    together = note_mixed(both, monkeypatch)
    run = drive.generate(both, requests(5), stagger=2)
    assert all(end is not None for end in run.ends) and len(set(together)) > 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_ends_the_request(tmp_path, device, value):
    """One weight of a value's head in the first layer; queries and keys are sound."""
    broken = drive.load_folded(write_checkpoint(tmp_path / "model", Shape(), with_tokenizer=False))
    kv = broken.config.kv_heads * broken.config.head_dim
    assert isinstance(broken.model, Qwen3)
    broken.model.model.layers[0].self_attn.qkv_proj.weight[-kv] = value
    result = drive.Hand(make_pair(broken)[0]).admit(1, requests(3)[2])
    assert result.ends.tolist() == [(1, End.NUMERICAL)] and result.tokens[1] == -1


def test_a_sequence_beyond_the_model_is_refused(pair):
    hand = drive.Hand(pair[0])
    request = requests(1)[0]
    request.max_tokens = pair[0].limits.max_model_len
    with pytest.raises(PlanError, match="more than"):
        hand.admit(0, request)


@pytest.mark.parametrize("captured", [False, True])
def test_a_prompt_that_is_cached_whole(pair, captured, monkeypatch):
    """Its last position is read where it is, as others, and not written; the answer goes on in a new block.

    Beside a slot that decodes from its blocks. The position's key and value are others than would be
    computed, so that a write would show.
    """
    both, ours, theirs = Both(pair), pair[0]._cache, pair[1].cache
    if not captured:
        pair[0]._prefiller.sizes.clear()
    together = note_mixed(both, monkeypatch)
    hand = drive.Hand(both)
    prompt = [(3 * i + i * i) % 300 for i in range(32)]
    hand.admit(0, drive.Request(prompt, 16))
    hand.bound = 3
    hand.plan()
    with torch.inference_mode():
        for place in (ours[:, :, 1, :, -1], theirs[:, 1, :, :, -1]):
            place.neg_().mul_(1.5)
    before = ours[:, :, :2].clone()
    request = drive.Request(prompt, 16, drive.sampling(temperature=0.7, seed=3))
    result = hand.plan(**drive.known(2, [0, 1], request))
    assert result.tokens[0] >= 0 and result.tokens[2] >= 0
    assert torch.equal(ours[:, :, :2], before), "what others read"
    hand.plan(appends=np.array([(2, 4)], APPEND))
    assert hand.plan().tokens[2] >= 0
    assert torch.equal(ours[:, :, :2], before) and ours[:, 0, 4, :, :2].isfinite().all()
    assert bool(together) == captured


@pytest.mark.parametrize(
    "chunk", [{"last": 0}, {"count": 2}, {"start": 30}, {"start": 30, "count": 2}, {"start": 0, "count": 32}]
)
def test_of_what_is_cached_only_the_last_position_is_computed_again(pair, chunk):
    hand = drive.Hand(pair[0])
    request = drive.Request(list(range(32)), 16)
    with pytest.raises(PlanError, match=r"chunk of .*, slot 1: 32 positions are cached"):
        hand.plan(**drive.known(1, [0, 1], request, **chunk))


def test_a_held_slot_moves_under_its_mask(pair):
    hand = drive.Hand(Both(pair))
    hand.admit(2, requests(1)[0], mode=Mode.HELD)
    masks = np.zeros((1, 10), np.uint32)
    masks[0, 3] = 1 << 7
    assert hand.plan().tokens[2] == -1
    assert hand.plan(held=np.array([2], np.uint16), masks=masks).tokens[2] == 3 * 32 + 7
    assert hand.plan().tokens[2] == -1


def test_a_slot_released_and_admitted_in_one_plan(pair):
    hand = drive.Hand(Both(pair))
    first, second, third = requests(3)
    hand.admit(1, third)
    hand.plan()
    hand.admit(1, second, releases=np.array([1], np.uint16))
    hand.admit(3, first, releases=np.array([1], np.uint16))
    assert hand.plan().tokens.tolist()[:3] == [-1, -1, -1]


def test_changes_beyond_a_page_are_sent_apart(pair, monkeypatch):
    both = Both(pair)
    inbox = pair[0]._inbox
    monkeypatch.setattr(inbox, "_numbers", inbox._numbers[:, : pair[0]._prefiller.words])
    hand = drive.Hand(both)
    for slot, request in enumerate(requests(3)):
        hand.admit(slot, request)
    hand.plan()


def test_pages_are_not_written_while_they_may_be_read(pair):
    """As many steps in flight as the ring holds have pages of their own; more are refused."""
    made, _ = pair
    for step in range(1, RING):
        made.submit(Plan(step=step))
    assert len({pending.place for pending in made._pending}) == RING - 1
    with pytest.raises(PlanError, match="in flight"):
        made.submit(Plan(step=RING))
    assert [result.step for result in made.finished()] == list(range(1, RING))


@pytest.mark.parametrize(
    ("chunk", "message"), [((0, 1, 0, 41), "rows"), ((0, 1, 500, 13), "beyond"), ((5, 1, 0, 1), "slot 5")]
)
def test_chunks_that_cannot_be_are_refused(pair, chunk, message):
    tokens = np.zeros(chunk[3], np.int32)
    with pytest.raises(PlanError, match=message):
        pair[0].execute(
            Plan(step=1, row_bound=1, bucket=1, chunks=np.array([chunk], CHUNK), chunk_tokens=tokens)
        )


def test_a_bucket_beyond_the_table_is_refused(pair):
    with pytest.raises(PlanError, match="bucket 6"):
        pair[0].execute(Plan(step=1, row_bound=5, bucket=6))


def test_a_step_has_rows_for_what_decodes_alone(pair, monkeypatch):
    """The last slot of the table, in a bucket of one."""
    hand = drive.Hand(Both(pair))
    hand.admit(4, requests(2)[1])
    rows, step = [], pair[0].decoder.step

    def note(bucket):
        rows.append(bucket)
        step(bucket)

    monkeypatch.setattr(pair[0].decoder, "step", note)
    plan = Plan(step=hand.step + 1, row_bound=5, bucket=1)
    assert hand.runner.execute(plan).tokens[4] >= 0 and rows == [1]


def test_a_steady_plan_sends_nothing(pair, monkeypatch):
    hand = drive.Hand(Both(pair))
    hand.admit(0, requests(1)[0])
    monkeypatch.setattr(pair[0]._inbox, "send", lambda *_: pytest.fail("a copy"))
    hand.plan()


def random_plan(rng, tiling):
    """Chunks of a plan, as many as a captured pass may have at most, and which of them are known."""
    count = rng.integers(1, prompt_rows.PICKS + 1)
    chunks = np.zeros(count, CHUNK)
    chunks["slot"] = rng.permutation(64)[:count]
    chunks["start"] = rng.integers(0, 9000, count) * rng.integers(0, 2, count)
    chunks["count"] = rng.integers(1, rng.choice([2, 20, 300]), count)
    chunks["last"] = rng.integers(0, 2, count)
    known = rng.integers(0, 4, count) == 0
    chunks["count"][known] = chunks["last"][known] = 1
    return Plan(step=1, chunks=chunks, chunk_tokens=np.arange(chunks["count"].sum()).astype(np.int32)), known


@pytest.mark.parametrize("processors", [4, 132])
def test_what_is_written_down(processors, monkeypatch):
    """Every row is in one tile of its chunk; tiles' parts cover what their last row sees, once."""
    monkeypatch.setattr(prefill_attention, "machine", lambda _: (90, processors))
    tiling = prefill_attention.Tiling.make(16, 8, 128, 64, torch.device("cpu"))
    sizes = prompt_rows.captured_sizes(tiling, 64, 8192)
    words = prompt_rows.largest_words(tiling, 64, 32 * 300)
    rng = np.random.default_rng()
    for _ in range(200):
        plan, known = random_plan(rng, tiling)
        page = rng.integers(-9, 9, words).astype(np.int32)
        split = bool(rng.integers(0, 4))
        size = prompt_rows.write(plan, known, tiling, sizes, page, split)
        assert size.words <= words
        rows = size.cut(page)
        total = len(plan.chunk_tokens)
        assert total <= size.rows
        slot, start, count = (plan.chunks[name].astype(int) for name in ("slot", "start", "count"))
        expected = [(s, a + i) for s, a, n in zip(slot, start, count, strict=True) for i in range(n)]
        writes = [-1 if k else s for s, n, k in zip(slot, count, known, strict=True) for _ in range(n)]
        assert rows.slots[:total].tolist() == writes
        assert rows.positions[:total].tolist() == [at for _, at in expected]
        assert rows.tokens[:total].tolist() == list(range(total))
        assert (rows.slots[total:] == -1).all() and not rows.positions[total:].any()
        ends, last = count.cumsum(), plan.chunks["last"]
        picks = [(int(end) - 1, s) for end, s, is_last in zip(ends, slot, last, strict=True) if is_last]
        found = [*zip(rows.picked.tolist(), rows.pick_slots.tolist(), strict=True)]
        assert found == picks + [(0, -1)] * (len(found) - len(picks))
        seen: dict[int, list[tuple[int, int]]] = {}
        parts: dict[int, list[int]] = {}
        for first, n, s, at, low, high, part, _ in rows.items.tolist():
            if not n:
                continue
            assert [(s, at + i) for i in range(n)] == expected[first : first + n]
            seen.setdefault(first, []).append((low, high))
            if part >= 0:
                parts.setdefault(first, []).append(part)
            for row in range(first, first + n):
                seen.setdefault(row, seen[first])
        assert sorted(seen) == list(range(total))
        for row, spans in seen.items():
            assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(spans))
            assert spans[-1][1] > expected[row][1]
        splits = {f: (n, p, k) for f, n, p, k in rows.splits.tolist() if n}
        assert {f: list(range(p, p + k)) for f, (_, p, k) in splits.items()} == parts
        used = [p for of in parts.values() for p in of]
        assert split or not used
        assert sorted(used) == list(range(len(used))) and len(used) <= prefill_attention.PARTS
