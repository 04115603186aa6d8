"""A worker's slot table and KV cache in integers: executes plans exactly by the run-ahead contract.

The slow twin of a GPU worker, and its conscience: whatever a real worker relies on silently is checked here
and raises `ContractError`. A KV position holds the chain of all tokens up to it, and decoding reads the chain
of the position before through the block table: content that is not what it should be changes tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton_sim.fake_model import Chain, FakeModel, extend_each
from baton_wire.columns import TOKEN, Column
from baton_wire.hello import WorkerHello
from baton_wire.plan import MAX_STOP_IDS, Mode, Plan
from baton_wire.result import ENDED, NO_TOKEN, End, Result
from baton_wire.state import Occupancy, state_hash

FREE, PREFILL, DECODE = (np.uint8(o) for o in (Occupancy.FREE, Occupancy.PREFILL, Occupancy.DECODE))
NOBODY = -1
# One sampled token: when, and when its step began (monotonic clock, nanoseconds); its seed and position.
STEP_LOG = np.dtype([("at_ns", "<i8"), ("began_ns", "<i8"), ("seed", "<u8"), ("position", "<i8")])


class ContractError(AssertionError):
    """A plan that no correct core sends to a worker in this state."""


def require(condition: Any, text: str) -> None:
    """Raises `ContractError` with `text` unless `condition`."""
    if not condition:
        raise ContractError(text)


class KvCache:
    """Blocks, who uses them and what they hold.

    `users[block]`: live slots whose table has the block. `writer[block]`: the slot that may write it.
    `fill[block]`: positions [0, fill) hold valid content.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.users = np.zeros(num_blocks, np.int32)
        self.writer = np.full(num_blocks, NOBODY, np.int32)
        self.fill = np.zeros(num_blocks, np.int32)
        self.tokens = np.zeros((num_blocks, block_size), TOKEN)
        self.chains = np.zeros((num_blocks, block_size), np.uint64)

    def take(self, block: int, slot: int) -> None:
        """`slot` gets the block to write: nobody may use it, and what it held is gone."""
        require(self.users[block] == 0, f"block {block} is given to slot {slot} while another slot uses it")
        self.users[block], self.writer[block], self.fill[block] = 1, slot, 0

    def share(self, block: int, before: int | None) -> None:
        """One more slot reads the full block, which continues the content of block `before`."""
        require(self.fill[block] == self.block_size, f"block {block} is shared but not full")
        chain = self.chains[before, -1:] if before is not None else np.zeros(1, np.uint64)
        follows = extend_each(chain, self.tokens[block, :1])
        require(follows == self.chains[block, :1], f"block {block} does not continue block {before}")
        self.users[block] += 1

    def drop(self, blocks: Column) -> None:
        """A slot uses these blocks no more; their content stays until they are taken."""
        self.users[blocks] -= 1
        require((self.users[blocks] >= 0).all(), "a block was given back twice")

    def read(self, blocks: Column, offsets: Column) -> NDArray[np.uint64]:
        """Chains at (block, offset); all must have been written."""
        require((blocks >= 0).all(), "a position is read beyond the blocks of its slot")
        require((self.fill[blocks] > offsets).all(), "a position is read that was never written")
        chains: NDArray[np.uint64] = self.chains[blocks, offsets]
        return chains

    def write(
        self, slots: Column, blocks: Column, offsets: Column, tokens: Column, chains: NDArray[np.uint64]
    ) -> None:
        """Content at (block, offset); each must be the block's next position and the slot its writer.

        Positions of one block must be consecutive and ascending.
        """
        require((blocks >= 0).all(), "a position is written beyond the blocks of its slot")
        require((self.writer[blocks] == slots).all(), "a slot writes a block that is not its own")
        first = np.ones(len(blocks), bool)
        first[1:] = blocks[1:] != blocks[:-1]
        require((self.fill[blocks[first]] == offsets[first]).all(), "a position is written out of order")
        self.tokens[blocks, offsets] = tokens
        self.chains[blocks, offsets] = chains
        self.fill[blocks] = offsets + 1


class SlotTable:
    """Executes one epoch's plans. `execute` is the whole worker."""

    def __init__(self, hello: WorkerHello, model: FakeModel) -> None:
        self.hello = hello
        self.model = model
        slots, size = hello.max_slots, hello.block_size
        self.step = 0
        self.kv = KvCache(hello.num_blocks, size)
        self.occupancy = np.zeros(slots, np.uint8)
        self.admitted = np.zeros(slots, np.int64)
        self.length = np.zeros(slots, np.int64)
        self.last_token = np.full(slots, NO_TOKEN, TOKEN)
        self.cached = np.zeros(slots, np.int64)
        self.max_length = np.zeros(slots, np.int64)
        self.min_length = np.zeros(slots, np.int64)
        self.mode = np.zeros(slots, np.uint8)
        self.seed = np.zeros(slots, np.uint64)
        self.stops = np.full((slots, MAX_STOP_IDS), NO_TOKEN, TOKEN)
        self.blocks = np.full((slots, -(-hello.max_model_len // size)), NOBODY, np.int32)
        self.block_count = np.zeros(slots, np.int64)
        self.ended_at = np.zeros(slots, np.int64)  # step in which a free slot ended, 0 once released
        self._chain = Chain()
        self._hashes: dict[int, int] = {0: 0}
        self._applied = 0

    def execute(self, plan: Plan, exec_us: int = 0) -> Result:
        """The plan's result. Raises `ContractError`."""
        self._check_header(plan)
        self.step = plan.step
        for slot in plan.releases.tolist():
            self._release(slot)
        self._admit(plan)
        for slot, block in plan.appends.tolist():
            self._append(plan, slot, block)
        self._check_admitted(plan)
        tokens = np.full(plan.row_bound, NO_TOKEN, TOKEN)
        rows = self._decoding(plan)
        require(len(rows) <= plan.bucket, f"{len(rows)} slots decode in a bucket of {plan.bucket}")
        sampled = self._chunks(plan)
        require(
            len(rows) + len(plan.chunk_tokens) <= self.hello.max_tokens_per_step,
            "more tokens than a step holds",
        )
        self._decode(rows)
        ends = self._sample(np.concatenate((rows, np.array(sampled, np.int64))), tokens, self._masks(plan))
        return Result(plan.step, self._hash(), exec_us, 0, tokens, np.array(ends, ENDED))

    def sampled(self, tokens: Column, began_ns: int, at_ns: int) -> Column:
        """Records of STEP_LOG of the step just executed, whose result has these `tokens`."""
        rows = np.flatnonzero(tokens != NO_TOKEN)
        records = np.empty(len(rows), STEP_LOG)
        records["at_ns"], records["began_ns"] = at_ns, began_ns
        records["seed"], records["position"] = self.seed[rows], self.length[rows]
        return records

    def _check_header(self, plan: Plan) -> None:
        require(plan.step == self.step + 1, f"plan of step {plan.step} after step {self.step}")
        require(self._applied <= plan.applied <= self.step, f"applied {plan.applied} is not in order")
        require(self._hashes[plan.applied] == plan.state_hash, f"state hash of step {plan.applied} differs")
        for step in range(self._applied, plan.applied):
            del self._hashes[step]
        self._applied = plan.applied
        require(plan.bucket % self.hello.row_multiple == 0, "the bucket is no multiple of row_multiple")

    # ---- changes ----------------------------------------------------------------------------------------

    def _release(self, slot: int) -> None:
        ended = self.ended_at[slot] > 0
        require(ended or self.occupancy[slot] != FREE, f"slot {slot} is released though free")
        if not ended:
            self._free(slot)
        self.ended_at[slot] = 0

    def _free(self, slot: int) -> None:
        count = self.block_count[slot]
        self.kv.drop(self.blocks[slot, :count])
        self.blocks[slot, :count] = NOBODY
        self.block_count[slot] = 0
        self.occupancy[slot] = FREE
        self.last_token[slot] = NO_TOKEN

    def _admit(self, plan: Plan) -> None:
        first_stop = 0
        for slot, mode, stops, cached, max_length, min_length, sampling in plan.admissions.tolist():
            require(self.occupancy[slot] == FREE, f"slot {slot} is admitted though in use")
            require(
                self.ended_at[slot] <= plan.applied, f"slot {slot} ended, but the core cannot know that yet"
            )
            require(cached % self.hello.block_size == 0, "a part of a block is shared")
            require(cached < max_length <= self.hello.max_model_len, f"max_length {max_length} is impossible")
            self.occupancy[slot], self.mode[slot], self.ended_at[slot] = PREFILL, mode, 0
            self.admitted[slot], self.last_token[slot] = self.step, NO_TOKEN
            self.length[slot] = self.cached[slot] = cached
            self.max_length[slot], self.min_length[slot] = max_length, min_length
            self.seed[slot] = sampling[0]
            self.stops[slot, :stops] = plan.stop_ids[first_stop : first_stop + stops]
            self.stops[slot, stops:] = NO_TOKEN
            first_stop += stops

    def _append(self, plan: Plan, slot: int, block: int) -> None:
        if self.occupancy[slot] == FREE:  # it ended, and the core did not know
            require(
                self.ended_at[slot] > plan.applied, f"block {block} is appended to slot {slot}, which is free"
            )
            return
        count = int(self.block_count[slot])
        require(count < self.blocks.shape[1], f"slot {slot} has more blocks than max_model_len needs")
        if count * self.hello.block_size < self.cached[slot]:
            self.kv.share(block, int(self.blocks[slot, count - 1]) if count else None)
        else:
            self.kv.take(block, slot)
        self.blocks[slot, count] = block
        self.block_count[slot] = count + 1

    def _check_admitted(self, plan: Plan) -> None:
        for slot in plan.admissions["slot"].tolist():
            free = self.block_count[slot] * self.hello.block_size - self.cached[slot]
            chunks = plan.chunks[plan.chunks["slot"] == slot]
            known = (chunks["start"] < self.cached[slot]).any()  # its only chunk, or `_chunks` refuses it
            require(free > 0 or (free == 0 and known), f"slot {slot} has no block to write in")
        live = np.flatnonzero(self.occupancy)
        require(
            not len(live) or live[-1] < plan.row_bound, f"row bound {plan.row_bound} cuts off a live slot"
        )

    # ---- forward ----------------------------------------------------------------------------------------

    def _decoding(self, plan: Plan) -> Column:
        """Rows that advance by their own last token: auto slots, and the held ones named."""
        advancing = (self.occupancy == DECODE) & (self.mode == Mode.AUTO)
        for slot in plan.held.tolist():
            require(self.mode[slot] == Mode.HELD or self.occupancy[slot] == FREE, f"slot {slot} is not held")
            advancing[slot] = self.occupancy[slot] == DECODE
        return np.flatnonzero(advancing)

    def _decode(self, rows: Column) -> None:
        """Writes each row's last token at its length."""
        if not len(rows):
            return
        size, position, tokens = self.hello.block_size, self.length[rows], self.last_token[rows]
        before = position - 1
        chains = self.kv.read(self.blocks[rows, before // size], before % size)
        grown = extend_each(chains, tokens)
        self.kv.write(rows, self.blocks[rows, position // size], position % size, tokens, grown)
        self.length[rows] = position + 1

    def _chunks(self, plan: Plan) -> list[int]:
        """Writes the chunks; returns the slots whose prompt ends.

        Where a prompt is cached whole, its only chunk is its last position, which is there already.
        """
        sampled, first = [], 0
        for slot, last, start, count in plan.chunks.tolist():
            require(self.occupancy[slot] == PREFILL, f"a chunk for slot {slot}, which does not prefill")
            length = self.length[slot]
            known = bool(start + 1 == length == self.cached[slot] and count == last == 1)
            require(start == length or known, f"slot {slot}: chunk at {start}, length {length}")
            require(start + count < self.max_length[slot], f"slot {slot}: the prompt fills max_length")
            tokens = plan.chunk_tokens[first : first + count]
            require((tokens < self.hello.vocab_size).all(), f"slot {slot}: a token beyond the vocabulary")
            self._prefill(slot, start, tokens, known)
            first += count
            if last:
                self.occupancy[slot] = DECODE
                sampled.append(slot)
        return sampled

    def _prefill(self, slot: int, start: int, tokens: Column, known: bool) -> None:
        size = self.hello.block_size
        positions = np.arange(start, start + len(tokens))
        chain = 0
        if start:
            block, offset = self.blocks[slot, (start - 1) // size], (start - 1) % size
            chain = int(self.kv.read(np.array([block]), np.array([offset]))[0])
        chains = self._chain.extend(chain, tokens)
        blocks, offsets = self.blocks[slot, positions // size], positions % size
        if known:
            same = (self.kv.read(blocks, offsets) == chains).all()
            require(same, f"slot {slot}: what is cached at {start} is not what its chunk says")
        else:
            self.kv.write(np.full(len(tokens), slot), blocks, offsets, tokens, chains)
        self.length[slot] = start + len(tokens)

    # ---- sampling ---------------------------------------------------------------------------------------

    def _sample(self, rows: Column, tokens: Column, masks: dict[int, Column]) -> list[tuple[int, int]]:
        """Samples for `rows` into `tokens`; returns (slot, reason) of those that ended."""
        if not len(rows):
            return []
        size, position = self.hello.block_size, self.length[rows]
        last = position - 1
        chains = self.kv.read(self.blocks[rows, last // size], last % size)
        drawn = self.model.sample(self.seed[rows], position, chains)
        stop = self._constrain(rows, drawn, position, masks)
        self.last_token[rows] = tokens[rows] = drawn
        ends = []
        for i in np.flatnonzero(
            stop | (position + 1 >= self.max_length[rows]) | (drawn == NO_TOKEN)
        ).tolist():
            slot = int(rows[i])
            reason = End.NUMERICAL if drawn[i] == NO_TOKEN else End.STOP if stop[i] else End.LENGTH
            self._free(slot)
            self.ended_at[slot] = self.step
            ends.append((slot, int(reason)))
        return ends

    def _constrain(
        self, rows: Column, drawn: Column, position: Column, masks: dict[int, Column]
    ) -> NDArray[np.bool_]:
        """Applies stop ids below the minimum length and token masks; returns which tokens are stop ids."""
        stop = (self.stops[rows] == drawn[:, None]).any(axis=1) & (drawn != NO_TOKEN)
        early = position < self.min_length[rows]
        for i in np.flatnonzero(stop & early).tolist():
            drawn[i] = self.model.allowed(int(drawn[i]), tuple(self.stops[rows[i]].tolist()))
        for i, slot in enumerate(rows.tolist() if masks else ()):
            if slot in masks and drawn[i] != NO_TOKEN:
                drawn[i] = self._masked(int(drawn[i]), masks[slot], slot, bool(early[i]))
                stop[i] = drawn[i] in self.stops[slot]
        ends: NDArray[np.bool_] = stop & ~early
        return ends

    def _masked(self, token: int, mask: Column, slot: int, early: bool) -> int:
        """The first token from `token` on that the mask (and, early, the stop ids) allow."""
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.hello.vocab_size]
        if early:
            allowed[self.stops[slot][self.stops[slot] != NO_TOKEN]] = 0
        choices = np.flatnonzero(allowed)
        require(len(choices), f"slot {slot}: its mask allows no token")
        return int(choices[np.searchsorted(choices, token) % len(choices)])

    def _masks(self, plan: Plan) -> dict[int, Column]:
        if not plan.masks.shape[1]:
            return {}
        return dict(zip(plan.held.tolist(), plan.masks, strict=True))

    def _hash(self) -> int:
        rows = np.flatnonzero(self.occupancy)
        value = state_hash(
            rows, self.admitted[rows], self.length[rows], self.occupancy[rows], self.last_token[rows]
        )
        self._hashes[self.step] = value
        return value
