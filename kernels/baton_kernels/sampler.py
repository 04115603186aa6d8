"""One token per row from its logits: greedy or Gumbel-max, with top-k, top-p and min-p, and no sort.

Twin: `reference.sample`. The first kernel reads the logits once, in tiles: maxima, NaN, and, for rows without
a filter, the best score of each tile. The second ends every row: it picks the best tile, or, for a row with a
filter, narrows down the distance from the maximum (in units of temperature) beyond which tokens are out:
three thresholds per pass, skipping tiles that lie beyond the last, until the set is known. Both kernels are
fit for graph capture: parameters are read from the slot table on the device.

Where the twin works with weights exp(-d), the search works with d + 1 in float32: tokens nearer than 1.2e-7
to the last one that is in are in too. See `noise` for the accuracy of the noise.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.noise import gumbel, noise_key

NOT_FINITE = -1  # sampled where the logits have no finite maximum
_TILE = 4096
_MASK_BITS = tl.constexpr(32)
_NEAREST = tl.constexpr(0x3F800000)  # bits of 1.0: distance 0
_FARTHEST = tl.constexpr(0x43010000)  # bits of 129.0: weights beyond are 0 in float32
_MAX_PASSES = tl.constexpr(32)


class SamplingColumns(Protocol):
    """Columns of the slot table that sampling reads, each [slots] unless noted; integers of any width."""

    length: Tensor  # the position of the token to come
    min_length: Tensor
    stop_ids: Tensor  # [slots, stops], -1 where there is none
    seed: Tensor  # int64
    temperature: Tensor  # float32, also the next two
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor


@dataclass(frozen=True, slots=True)
class SampleWork:
    """Scratch space, made once for the most rows: what the first kernel tells the second, [rows, tiles]."""

    maximum: Tensor  # float32, NaN where the tile holds one
    best: Tensor  # float32, the best score above the tile's maximum
    token: Tensor  # int32, whose it is

    @staticmethod
    def make(rows: int, vocabulary: int, device: torch.device | str) -> "SampleWork":
        """Space for `rows` rows of `vocabulary` logits."""
        size = (rows, triton.cdiv(vocabulary, _TILE))
        return SampleWork(
            maximum=torch.empty(size, dtype=torch.float32, device=device),
            best=torch.empty(size, dtype=torch.float32, device=device),
            token=torch.empty(size, dtype=torch.int32, device=device),
        )


@triton.jit
def _load_logits(
    logits_ptr,
    allowed_ptr,
    stop_ptr,
    ids,
    vocabulary,
    early,
    masked,
    STOPS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """float32, -inf where a token may not be sampled."""
    logits = tl.load(logits_ptr + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    if early:
        for i in range(STOPS):
            logits = tl.where(ids == tl.load(stop_ptr + i).to(tl.int32), float("-inf"), logits)
    if MASKED:  # a constant; `masked` is not
        ruled = ids < tl.where(masked, vocabulary, 0)
        words = tl.load(allowed_ptr + ids // _MASK_BITS, mask=ruled, other=-1)
        logits = tl.where((words >> (ids % _MASK_BITS)) & 1 != 0, logits, float("-inf"))
    return logits


@triton.jit
def _is_filtered(temperature, top_k, top_p, min_p, vocabulary):
    limited = (top_k > 0) & (top_k < vocabulary)
    return (temperature > 0) & (limited | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def score_tiles_kernel(
    logits_ptr,
    slot_ptr,
    allowed_ptr,
    mask_row_ptr,
    length_ptr,
    min_length_ptr,
    stop_ptr,
    seed_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    top_k_ptr,
    maximum_ptr,
    best_ptr,
    token_ptr,
    logits_stride,
    allowed_stride,
    vocabulary,
    tiles,
    STOPS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (tile, row)."""
    tile, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if slot < 0:
        return
    ids = tile * TILE + tl.arange(0, TILE)
    length = tl.load(length_ptr + slot).to(tl.int64)
    mask_row = tl.load(mask_row_ptr + row) if MASKED else 0
    logits = _load_logits(
        logits_ptr + row.to(tl.int64) * logits_stride,
        allowed_ptr + mask_row * allowed_stride,
        stop_ptr + slot * STOPS,
        ids,
        vocabulary,
        length < tl.load(min_length_ptr + slot),
        mask_row >= 0,
        STOPS,
        MASKED,
    )
    maximum = tl.max(logits, 0)
    broken = tl.max((logits != logits).to(tl.int32), 0) > 0
    temperature = tl.load(temperature_ptr + slot)
    filtered = _is_filtered(
        temperature,
        tl.load(top_k_ptr + slot),
        tl.load(top_p_ptr + slot),
        tl.load(min_p_ptr + slot),
        vocabulary,
    )
    place = row * tiles + tile
    tl.store(maximum_ptr + place, tl.where(broken, float("nan"), maximum))
    if not filtered:
        above = logits - tl.where(maximum > float("-inf"), maximum, 0.0)
        if temperature > 0:
            above = above / temperature + gumbel(noise_key(tl.load(seed_ptr + slot), length), ids)
        tl.store(best_ptr + place, tl.max(above, 0))
        tl.store(token_ptr + place, tile * TILE + tl.argmax(above, 0).to(tl.int32))


@triton.jit
def _distance(logits, maximum, temperature):
    """How far below the maximum, in units of temperature; `inf` for tokens that are out."""
    return (maximum - logits) / temperature


@triton.jit
def _is_near(distance, threshold):
    """Whether nearer than the threshold, given as bits of distance + 1."""
    return (distance + 1.0).to(tl.int32, bitcast=True) < threshold


@triton.jit
def _below(distance, threshold):
    """(number, weight) of the tokens nearer than the threshold."""
    near = _is_near(distance, threshold)
    return near.to(tl.int32), tl.where(near, tl.exp(-distance), 0.0)


@triton.jit
def _narrow(
    logits_ptr,
    allowed_ptr,
    stop_ptr,
    tile_maximum_ptr,
    maximum,
    temperature,
    early,
    masked,
    vocabulary,
    tiles,
    low,
    low_count,
    low_weight,
    high,
    high_count,
    high_weight,
    want_count,
    want_weight,
    STOPS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Narrows [low, high), bits of distance + 1, around the last token that is in.

    Invariant: nearer than `low` are fewer than `want_count` tokens of less weight than `want_weight`; nearer
    than `high` it is otherwise. Done when one token or one distance is between. Returns the six again.
    """
    passes = 0
    while (passes < _MAX_PASSES) & (high - low > 1) & (high_count - low_count > 1):
        if passes == 0:  # where tokens that matter lie: nearer than 3, than 7, anywhere
            t1 = tl.minimum(tl.maximum(low, 0x40800000), high)
            t2 = tl.minimum(tl.maximum(low, 0x41000000), high)
            t3 = tl.minimum(_FARTHEST, high)
        else:
            step = tl.maximum((high - low) // 4, 1)
            t1 = low + step
            t2 = tl.minimum(t1 + step, high)
            t3 = tl.minimum(t2 + step, high)
        n1, n2, n3 = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
        w1, w2, w3 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        for tile in range(tiles):
            if _is_near(_distance(tl.load(tile_maximum_ptr + tile), maximum, temperature), t3):
                ids = tile * TILE + tl.arange(0, TILE)
                logits = _load_logits(
                    *(logits_ptr, allowed_ptr, stop_ptr, ids, vocabulary, early, masked, STOPS, MASKED)
                )
                distance = _distance(logits, maximum, temperature)
                n, w = _below(distance, t1)
                n1, w1 = n1 + n, w1 + w
                n, w = _below(distance, t2)
                n2, w2 = n2 + n, w2 + w
                n, w = _below(distance, t3)
                n3, w3 = n3 + n, w3 + w
        c1, c2, c3 = tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)
        s1, s2, s3 = tl.sum(w1, 0), tl.sum(w2, 0), tl.sum(w3, 0)
        if (c1 >= want_count) | (s1 >= want_weight):
            high, high_count, high_weight = t1, c1, s1
        elif (c2 >= want_count) | (s2 >= want_weight):
            low, low_count, low_weight = t1, c1, s1
            high, high_count, high_weight = t2, c2, s2
        elif (c3 >= want_count) | (s3 >= want_weight):
            low, low_count, low_weight = t2, c2, s2
            high, high_count, high_weight = t3, c3, s3
        else:
            low, low_count, low_weight = t3, c3, s3
            high_weight = tl.maximum(high_weight, s3)  # its first value is not known
        passes += 1
    return low, low_count, low_weight, high, high_count, high_weight


@triton.jit
def _pick_filtered(
    logits_ptr,
    allowed_ptr,
    stop_ptr,
    tile_maximum_ptr,
    maximum,
    temperature,
    early,
    masked,
    vocabulary,
    tiles,
    top_k,
    top_p,
    min_p,
    key,
    STOPS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """The token of a row with a filter."""
    nearest, none, nothing = (
        tl.full([], _NEAREST, tl.int32),
        tl.full([], 0, tl.int32),
        tl.full([], 0.0, tl.float32),
    )
    everything = tl.full([], _FARTHEST + 1, tl.int32)
    want = tl.where((top_k > 0) & (top_k < vocabulary), top_k, vocabulary + 1).to(tl.int32)
    low, low_count, low_weight, high, high_count, high_weight = _narrow(
        *(logits_ptr, allowed_ptr, stop_ptr, tile_maximum_ptr, maximum, temperature, early, masked),
        *(vocabulary, tiles, nearest, none, nothing, everything, none + vocabulary + 2, nothing),
        *(want, float("inf"), STOPS, MASKED, TILE),
    )
    if low >= _FARTHEST:  # fewer tokens than wanted: all of them
        high, high_count, high_weight = low, low_count, low_weight
    if top_p < 1.0:
        between = tl.maximum(high_count - low_count, 1)
        last = (high_weight - low_weight) / between * tl.minimum(want - low_count, between)
        low, low_count, low_weight, high, high_count, high_weight = _narrow(
            *(logits_ptr, allowed_ptr, stop_ptr, tile_maximum_ptr, maximum, temperature, early, masked),
            *(vocabulary, tiles, nearest, none, nothing, high, high_count, high_weight),
            *(vocabulary + 1, top_p * (low_weight + last), STOPS, MASKED, TILE),
        )
    best = tl.full([TILE], float("-inf"), tl.float32)
    token = tl.zeros([TILE], tl.int32)
    for tile in range(tiles):
        if _is_near(_distance(tl.load(tile_maximum_ptr + tile), maximum, temperature), high):
            ids = tile * TILE + tl.arange(0, TILE)
            logits = _load_logits(
                *(logits_ptr, allowed_ptr, stop_ptr, ids, vocabulary, early, masked, STOPS, MASKED)
            )
            distance = _distance(logits, maximum, temperature)
            kept = _is_near(distance, high) & (tl.exp(-distance) >= min_p)
            score = tl.where(kept, gumbel(key, ids) - distance, float("-inf"))
            token = tl.where(score > best, ids, token)
            best = tl.maximum(score, best)
    winner = tl.max(best, 0)
    return tl.min(tl.where(best == winner, token, vocabulary), 0)


@triton.jit
def finish_rows_kernel(
    logits_ptr,
    slot_ptr,
    allowed_ptr,
    mask_row_ptr,
    length_ptr,
    min_length_ptr,
    stop_ptr,
    seed_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    top_k_ptr,
    maximum_ptr,
    best_ptr,
    token_ptr,
    sampled_ptr,
    logits_stride,
    allowed_stride,
    vocabulary,
    tiles,
    STOPS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    TILES_PADDED: tl.constexpr,
):
    """One program, one row: writes the token, or NOT_FINITE, at the row's slot."""
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if slot < 0:
        return
    tile = tl.arange(0, TILES_PADDED)
    inside = tile < tiles
    place = row * tiles + tile
    maxima = tl.load(maximum_ptr + place, mask=inside, other=float("-inf"))
    broken = tl.max((maxima != maxima).to(tl.int32), 0) > 0
    maximum = tl.max(maxima, 0)
    temperature = tl.load(temperature_ptr + slot)
    top_k, top_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    token = -1
    if broken | (maximum == float("-inf")) | (maximum == float("inf")):
        token = -1
    elif _is_filtered(temperature, top_k, top_p, min_p, vocabulary):
        length = tl.load(length_ptr + slot).to(tl.int64)
        mask_row = tl.load(mask_row_ptr + row) if MASKED else 0
        token = _pick_filtered(
            logits_ptr + row.to(tl.int64) * logits_stride,
            allowed_ptr + mask_row * allowed_stride,
            stop_ptr + slot * STOPS,
            maximum_ptr + row * tiles,
            maximum,
            temperature,
            length < tl.load(min_length_ptr + slot),
            mask_row >= 0,
            vocabulary,
            tiles,
            top_k,
            top_p,
            min_p,
            noise_key(tl.load(seed_ptr + slot), length),
            STOPS,
            MASKED,
            TILE,
        )
    else:
        unit = tl.where(temperature > 0, temperature, 1.0)
        best = tl.load(best_ptr + place, mask=inside, other=float("-inf"))
        best = tl.where(maxima > float("-inf"), best + (maxima - maximum) / unit, float("-inf"))
        token = tl.load(token_ptr + row * tiles + tl.argmax(best, 0))
    tl.store(sampled_ptr + slot, token)


def sample(
    logits: Tensor,
    slots: Tensor,
    columns: SamplingColumns,
    work: SampleWork,
    sampled: Tensor,
    *,
    allowed: Tensor | None = None,
    mask_rows: Tensor | None = None,
) -> None:
    """Writes `sampled[slot]` for each row's slot: a token id, or NOT_FINITE.

    logits: [rows, vocabulary], any float dtype, rows may be strided; slots: int32 [rows], -1 for rows that
    sample nothing; sampled: int32 [slots]. `allowed`: int32 [masks, words], bit set = token allowed, words
    for the whole vocabulary; `mask_rows`: int32 [rows], which mask a row is under, -1 for none.
    """
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1 and columns.stop_ids.is_contiguous()
    tiles = work.maximum.shape[1]
    masked = allowed is not None
    shared = (
        logits,
        slots,
        slots if allowed is None else allowed,
        slots if mask_rows is None else mask_rows,
        columns.length,
        columns.min_length,
        columns.stop_ids,
        columns.seed,
        columns.temperature,
        columns.top_p,
        columns.min_p,
        columns.top_k,
        work.maximum,
        work.best,
        work.token,
    )
    sizes = (logits.stride(0), 0 if allowed is None else allowed.stride(0), vocabulary, tiles)
    constants = {"STOPS": columns.stop_ids.shape[1], "MASKED": masked, "TILE": _TILE}
    score_tiles_kernel[(tiles, rows)](*shared, *sizes, **constants, num_warps=8)
    finish_rows_kernel[(rows,)](
        *shared,
        sampled,
        *sizes,
        **constants,
        TILES_PADDED=triton.next_power_of_2(tiles),
        num_warps=16,
    )
