"""One token per row from its logits: greedy or Gumbel-max, with top-k, top-p and min-p, and no sort.

Twin: `reference.sample`. Three kernels, all fit for graph capture: parameters come from the slot table.
`score_tiles` reads the logits once, in tiles: maxima, NaN, and for rows without a filter the best score of
each tile. `finish_rows` picks the best tile. For a row with a filter it gathers the groups of tokens with the
largest maxima: they hold every token nearer to the row's maximum than some distance, and nearly always all
that the filter keeps. It narrows down the distance beyond which tokens are out, three thresholds per pass,
until the set is known, and takes the best score of those left. `search_rows` does the same over the whole row
where that was not enough; where no row needs it, it costs a launch.

Distances are in units of temperature. Where the twin works with weights exp(-d), the search works with d + 1
in float32: tokens nearer than 1.2e-7 to the last one that is in are in too. Scores are weight / exponential
noise, as the twin's; see `noise` for its accuracy.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.launch import INTERPRETED
from baton_kernels.noise import exponential, noise_key

NOT_FINITE = -1  # sampled where the logits have no finite maximum
_TILE = 4096
_GROUP = 64  # tokens of a group
_NEAR_GROUPS = 64  # groups gathered
_FINISH_WARPS = 4
_PENDING = tl.constexpr(-3)  # sampled by the last kernel
_MASK_BITS = tl.constexpr(32)
_NEAREST = tl.constexpr(0x3F800000)  # bits of 1.0: distance 0
_NEARER, _NEAR = tl.constexpr(0x40800000), tl.constexpr(0x41000000)  # of 4.0 and 8.0
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
    """Scratch space, made once for the most rows: what one kernel tells the next."""

    maximum: Tensor  # float32 [rows, tiles], NaN where the tile holds one
    best: (
        Tensor  # float32 [rows, tiles]: log of the best score above the tile's maximum; with a filter, weight
    )
    token: Tensor  # int32 [rows, tiles], whose score it is
    groups: Tensor  # float32 [rows, groups], maxima
    near: Tensor  # int32 [rows, _NEAR_GROUPS], which groups are gathered

    @staticmethod
    def make(rows: int, vocabulary: int, device: torch.device | str) -> "SampleWork":
        """Space for `rows` rows of `vocabulary` logits."""
        tiles = triton.cdiv(vocabulary, _TILE)

        def empty(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((rows, columns), dtype=dtype, device=device)

        return SampleWork(
            maximum=empty(tiles, torch.float32),
            best=empty(tiles, torch.float32),
            token=empty(tiles, torch.int32),
            groups=empty(tiles * (_TILE // _GROUP), torch.float32),
            near=empty(_NEAR_GROUPS, torch.int32),
        )


@triton.jit
def _restrict(
    logits,
    allowed_ptr,
    stop_ptr,
    ids,
    vocabulary,
    early,
    masked,
    STOPS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The logits, -inf where a token may not be sampled."""
    if early:
        for i in range(STOPS):
            logits = tl.where(ids == tl.load(stop_ptr + i).to(tl.int32), float("-inf"), logits)
    if MASKED:  # a constant; `masked` is not
        ruled = ids < tl.where(masked, vocabulary, 0)
        words = tl.load(allowed_ptr + ids // _MASK_BITS, mask=ruled, other=-1)
        logits = tl.where((words >> (ids % _MASK_BITS)) & 1 != 0, logits, float("-inf"))
    return logits


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
    return _restrict(logits, allowed_ptr, stop_ptr, ids, vocabulary, early, masked, STOPS, MASKED)


@triton.jit
def _is_filtered(temperature, top_k, top_p, min_p, vocabulary):
    limited = (top_k > 0) & (top_k < vocabulary)
    return (temperature > 0) & (limited | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def _maximum(a, b):
    """The larger one, NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


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
    groups_ptr,
    near_ptr,
    sampled_ptr,
    logits_stride,
    allowed_stride,
    vocabulary,
    tiles,
    STOPS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program (tile, row)."""
    tile, row = tl.program_id(0), tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    source = logits_ptr + row.to(tl.int64) * logits_stride + ids
    logits = tl.load(source, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if slot < 0:
        return
    length = tl.load(length_ptr + slot).to(tl.int64)
    seed, temperature = tl.load(seed_ptr + slot), tl.load(temperature_ptr + slot)
    top_k, top_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    early = length < tl.load(min_length_ptr + slot)
    mask_row = tl.load(mask_row_ptr + row) if MASKED else 0
    logits = _restrict(
        *(logits, allowed_ptr + mask_row * allowed_stride, stop_ptr + slot * STOPS, ids, vocabulary),
        *(early, mask_row >= 0, STOPS, MASKED),
    )
    maxima = tl.reduce(tl.reshape(logits, [TILE // GROUP, GROUP]), 1, _maximum)
    maximum = tl.reduce(maxima, 0, _maximum)
    place = row * tiles + tile
    tl.store(maximum_ptr + place, maximum)
    if temperature > 0:
        base = tl.where(maximum > float("-inf"), maximum, 0.0)
        weights = tl.exp((logits - base) / temperature)
        if _is_filtered(temperature, top_k, top_p, min_p, vocabulary):
            group = tl.arange(0, TILE // GROUP)
            tl.store(groups_ptr + place * (TILE // GROUP) + group, maxima)
            tl.store(best_ptr + place, tl.sum(weights, 0))
        else:
            score = weights / exponential(noise_key(seed, length), ids)
            best, token = tl.max(score, 0, return_indices=True)
            tl.store(best_ptr + place, tl.log(best))
            tl.store(token_ptr + place, tile * TILE + token.to(tl.int32))
    else:
        tl.store(best_ptr + place, 0.0)
        tl.store(token_ptr + place, tile * TILE + tl.argmax(logits, 0).to(tl.int32))


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
def _thresholds(passes, low, high):
    """Three between `low` and `high`, or equal to one of them."""
    step = tl.maximum((high - low) // 4, 1)
    t1 = low + step
    t2 = tl.minimum(t1 + step, high)
    t3 = tl.minimum(t2 + step, high)
    if passes == 0:  # where tokens that matter lie: nearer than 3, than 7, anywhere
        t1 = tl.minimum(tl.maximum(low, _NEARER), high)
        t2 = tl.minimum(tl.maximum(low, _NEAR), high)
        t3 = tl.minimum(_FARTHEST, high)
    return t1, t2, t3


@triton.jit
def _decide(
    t1,
    t2,
    t3,
    c1,
    c2,
    c3,
    s1,
    s2,
    s3,
    low,
    low_count,
    low_weight,
    high,
    high_count,
    high_weight,
    want_count,
    want_weight,
):
    """Keeps the part of [low, high) that the counts c and weights s below the thresholds t point to.

    Invariant: nearer than `low` are fewer than `want_count` tokens of less weight than `want_weight`; nearer
    than `high` it is otherwise, or `high` is beyond everything. Returns the six again.
    """
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
    return low, low_count, low_weight, high, high_count, high_weight


@triton.jit
def _add_six(a1, a2, a3, a4, a5, a6, b1, b2, b3, b4, b5, b6):
    return a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6


@triton.jit
def _six_sums(n1, n2, n3, w1, w2, w3):
    """Sums of all six, in one go where that is not slow."""
    if INTERPRETED:
        return tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0), tl.sum(w1, 0), tl.sum(w2, 0), tl.sum(w3, 0)
    else:  # noqa: RET505 - a constant decides, only one of the two is compiled
        return tl.reduce((n1, n2, n3, w1, w2, w3), 0, _add_six)


@triton.jit
def _start():
    """(bits of distance 0, no tokens, no weight): where a search starts."""
    return tl.full([], _NEAREST, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)


@triton.jit
def _narrow_near(
    distance, low, low_count, low_weight, high, high_count, high_weight, want_count, want_weight
):
    """Narrows [low, high), bits of distance + 1, around the last token that is in; see `_decide`.

    Of the distances given, in registers. Done when one token, or one distance, is between.
    """
    passes = 0
    while (passes < _MAX_PASSES) & (high - low > 1) & (high_count - low_count > 1):
        t1, t2, t3 = _thresholds(passes, low, high)
        n1, w1 = _below(distance, t1)
        n2, w2 = _below(distance, t2)
        n3, w3 = _below(distance, t3)
        c1, c2, c3, s1, s2, s3 = _six_sums(n1, n2, n3, w1, w2, w3)
        low, low_count, low_weight, high, high_count, high_weight = _decide(
            *(t1, t2, t3, c1, c2, c3, s1, s2, s3, low, low_count, low_weight),
            *(high, high_count, high_weight, want_count, want_weight),
        )
        passes += 1
    return low, low_count, low_weight, high, high_count, high_weight


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
    """As `_narrow_near`, of the whole row."""
    passes = 0
    while (passes < _MAX_PASSES) & (high - low > 1) & (high_count - low_count > 1):
        t1, t2, t3 = _thresholds(passes, low, high)
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
        c1, c2, c3, s1, s2, s3 = _six_sums(n1, n2, n3, w1, w2, w3)
        low, low_count, low_weight, high, high_count, high_weight = _decide(
            *(t1, t2, t3, c1, c2, c3, s1, s2, s3, low, low_count, low_weight),
            *(high, high_count, high_weight, want_count, want_weight),
        )
        passes += 1
    return low, low_count, low_weight, high, high_count, high_weight


@triton.jit
def _pick_anywhere(
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
    """The token of a row with a filter, whatever that keeps."""
    nearest, none, nothing = _start()
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
    best = tl.full([TILE], -1.0, tl.float32)
    token = tl.zeros([TILE], tl.int32)
    for tile in range(tiles):
        if _is_near(_distance(tl.load(tile_maximum_ptr + tile), maximum, temperature), high):
            ids = tile * TILE + tl.arange(0, TILE)
            logits = _load_logits(
                *(logits_ptr, allowed_ptr, stop_ptr, ids, vocabulary, early, masked, STOPS, MASKED)
            )
            distance = _distance(logits, maximum, temperature)
            kept = _is_near(distance, high) & (tl.exp(-distance) >= min_p)
            score = tl.where(kept, tl.exp(-distance) / exponential(key, ids), -1.0)
            token = tl.where(score > best, ids, token)
            best = tl.maximum(score, best)
    winner = tl.max(best, 0)
    return tl.min(tl.where(best == winner, token, vocabulary), 0)


@triton.jit
def _gather_near(
    groups_ptr, near_ptr, maximum, temperature, groups, PADDED: tl.constexpr, NEAR: tl.constexpr
):
    """Lists at most NEAR groups, those with the largest maxima: (how many, distance + 1 bits).

    Every token nearer than that distance is in one of them.
    """
    group = tl.arange(0, PADDED)
    maxima = tl.load(groups_ptr + group, mask=group < groups, other=float("-inf"))
    distance = _distance(maxima, maximum, temperature)
    nearest, none, nothing = _start()
    everything = tl.full([], _FARTHEST + 1, tl.int32)
    limit, _, _, _, _, _ = _narrow_near(
        *(distance, nearest, none, nothing, everything, none + groups + 2, nothing, NEAR + 1, float("inf")),
    )
    inside = _is_near(distance, limit).to(tl.int32)
    tl.store(near_ptr + tl.cumsum(inside, 0) - 1, group, mask=inside > 0)
    tl.debug_barrier()  # the list is written before any of the program reads it
    return tl.sum(inside, 0), limit


@triton.jit
def _pick_near(
    distance,
    ids,
    limit,
    all_weight,
    vocabulary,
    top_k,
    top_p,
    min_p,
    key,
):
    """The token of a row with a filter, from those nearer than `limit`; _PENDING if that may not be all."""
    nearest, none, nothing = _start()
    number, weights = _below(distance, limit)
    count, weight = tl.sum(number, 0), tl.sum(weights, 0)
    complete = limit >= _FARTHEST
    limited = (top_k > 0) & (top_k < vocabulary)
    high, high_count, high_weight = limit, count, weight
    share = tl.where(complete, weight, all_weight)  # what top-p is a part of
    if limited & (count > top_k):
        want = top_k.to(tl.int32)
        _, low_count, low_weight, high, high_count, high_weight = _narrow_near(
            *(distance, nearest, none, nothing, limit, count, weight, want, float("inf")),
        )
        between = tl.maximum(high_count - low_count, 1)
        share = low_weight + (high_weight - low_weight) / between * tl.minimum(want - low_count, between)
    elif limited:
        share = weight
    found = complete | tl.where(
        limited, count >= top_k, (top_p < 1.0) | (tl.exp(1.0 - limit.to(tl.float32, bitcast=True)) < min_p)
    )
    if top_p < 1.0:
        found = found & (complete | (weight >= top_p * share))
        _, _, _, high, _, _ = _narrow_near(
            *(distance, nearest, none, nothing, high, high_count, high_weight),
            *(none + vocabulary + 1, top_p * share),
        )
    kept = _is_near(distance, high) & (tl.exp(-distance) >= min_p)
    score = tl.where(kept, tl.exp(-distance) / exponential(key, ids), -1.0)
    best = tl.max(score, 0)
    token = tl.min(tl.where(score == best, ids, vocabulary), 0)
    return tl.where(found, token, _PENDING)


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
    groups_ptr,
    near_ptr,
    sampled_ptr,
    logits_stride,
    allowed_stride,
    vocabulary,
    tiles,
    STOPS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    NEAR: tl.constexpr,
    TILES_PADDED: tl.constexpr,
):
    """One program, one row: writes the token, NOT_FINITE or _PENDING at the row's slot."""
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if slot < 0:
        return
    tile = tl.arange(0, TILES_PADDED)
    inside = tile < tiles
    place = row * tiles + tile
    maxima = tl.load(maximum_ptr + place, mask=inside, other=float("-inf"))
    best = tl.load(best_ptr + place, mask=inside, other=float("-inf"))
    temperature, min_p = tl.load(temperature_ptr + slot), tl.load(min_p_ptr + slot)
    top_k, top_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot)
    broken = tl.max((maxima != maxima).to(tl.int32), 0) > 0
    maximum = tl.max(maxima, 0)
    unit = tl.where(temperature > 0, temperature, 1.0)
    above = (maxima - maximum) / unit
    token = -1
    if broken | (maximum == float("-inf")) | (maximum == float("inf")):
        token = -1
    elif _is_filtered(temperature, top_k, top_p, min_p, vocabulary):
        length = tl.load(length_ptr + slot).to(tl.int64)
        mask_row = tl.load(mask_row_ptr + row) if MASKED else 0
        groups = tiles * (TILE // GROUP)
        near_ptr += row * NEAR
        gathered, limit = _gather_near(
            *(groups_ptr + row * groups, near_ptr, maximum, temperature, groups),
            *(TILES_PADDED * (TILE // GROUP), NEAR),
        )
        index = tl.arange(0, NEAR * GROUP)
        group = tl.load(near_ptr + index // GROUP, mask=index < gathered * GROUP, other=groups)
        ids = group * GROUP + index % GROUP
        logits = _load_logits(
            *(logits_ptr + row.to(tl.int64) * logits_stride, allowed_ptr + mask_row * allowed_stride),
            *(stop_ptr + slot * STOPS, ids, vocabulary, length < tl.load(min_length_ptr + slot)),
            *(mask_row >= 0, STOPS, MASKED),
        )
        distance = _distance(logits, maximum, temperature)
        distance = tl.where(_is_near(distance, limit), distance, float("inf"))
        all_weight = tl.sum(tl.where(maxima > float("-inf"), best * tl.exp(above), 0.0), 0)
        key = noise_key(tl.load(seed_ptr + slot), length)
        token = _pick_near(distance, ids, limit, all_weight, vocabulary, top_k, top_p, min_p, key)
    else:
        score = tl.where(maxima > float("-inf"), best + above, float("-inf"))
        token = tl.load(token_ptr + row * tiles + tl.argmax(score, 0))
    tl.store(sampled_ptr + slot, token)


@triton.jit
def search_rows_kernel(
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
    groups_ptr,
    near_ptr,
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
    """One program, one row: writes the token of a row that is _PENDING."""
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if slot < 0:
        return
    if tl.load(sampled_ptr + slot) != _PENDING:
        return
    tile = tl.arange(0, TILES_PADDED)
    maximum = tl.max(tl.load(maximum_ptr + row * tiles + tile, mask=tile < tiles, other=float("-inf")), 0)
    length = tl.load(length_ptr + slot).to(tl.int64)
    mask_row = tl.load(mask_row_ptr + row) if MASKED else 0
    token = _pick_anywhere(
        *(logits_ptr + row.to(tl.int64) * logits_stride, allowed_ptr + mask_row * allowed_stride),
        *(stop_ptr + slot * STOPS, maximum_ptr + row * tiles, maximum, tl.load(temperature_ptr + slot)),
        *(length < tl.load(min_length_ptr + slot), mask_row >= 0, vocabulary, tiles),
        *(tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)),
        *(noise_key(tl.load(seed_ptr + slot), length), STOPS, MASKED, TILE),
    )
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
        work.groups,
        work.near,
        sampled,
    )
    sizes = (logits.stride(0), 0 if allowed is None else allowed.stride(0), vocabulary, tiles)
    constants = {"STOPS": columns.stop_ids.shape[1], "MASKED": masked, "TILE": _TILE}
    padded = triton.next_power_of_2(tiles)
    score_tiles_kernel[(tiles, rows)](*shared, *sizes, **constants, GROUP=_GROUP, num_warps=8)
    finish_rows_kernel[(rows,)](
        *shared,
        *sizes,
        **constants,
        GROUP=_GROUP,
        NEAR=_NEAR_GROUPS,
        TILES_PADDED=padded,
        num_warps=_FINISH_WARPS,
    )
    search_rows_kernel[(rows,)](*shared, *sizes, **constants, TILES_PADDED=padded, num_warps=16)
