"""Filters of the sampler: which tokens top-k, top-p and min-p keep, by searching, not sorting.

The distance of a token is how far its logit is below the row's maximum, in units of temperature; its weight
is exp(-distance). Tokens are kept up to some distance: the search keeps an interval around it as bits of
distance + 1 in float32, which order as integers, and tries three thresholds per pass.
"""

import triton
import triton.language as tl

from baton_kernels.launch import INTERPRETED
from baton_kernels.noise import exponential

PENDING = tl.constexpr(-3)  # instead of a token: not found among the tokens looked at
_MASK_BITS = tl.constexpr(32)
_NEAREST = tl.constexpr(0x3F800000)  # bits of 1.0: distance 0
_NEARER, _NEAR = tl.constexpr(0x40800000), tl.constexpr(0x41000000)  # of 4.0 and 8.0
_FARTHEST = tl.constexpr(0x43010000)  # bits of 129.0: weights beyond are 0 in float32
_MAX_PASSES = tl.constexpr(32)


@triton.jit
def restrict(
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
def load_logits(
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
    return restrict(logits, allowed_ptr, stop_ptr, ids, vocabulary, early, masked, STOPS, MASKED)


@triton.jit
def is_filtered(temperature, top_k, top_p, min_p, vocabulary):
    limited = (top_k > 0) & (top_k < vocabulary)
    return (temperature > 0) & (limited | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def distance_of(logits, maximum, temperature):
    """How far below the maximum, in units of temperature; `inf` for tokens that are out."""
    return (maximum - logits) / temperature


@triton.jit
def is_near(distance, threshold):
    """Whether nearer than the threshold, given as bits of distance + 1."""
    return (distance + 1.0).to(tl.int32, bitcast=True) < threshold


@triton.jit
def _below(distance, threshold):
    """(number, weight) of the tokens nearer than the threshold."""
    near = is_near(distance, threshold)
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
            if is_near(distance_of(tl.load(tile_maximum_ptr + tile), maximum, temperature), t3):
                ids = tile * TILE + tl.arange(0, TILE)
                logits = load_logits(
                    *(logits_ptr, allowed_ptr, stop_ptr, ids, vocabulary, early, masked, STOPS, MASKED)
                )
                distance = distance_of(logits, maximum, temperature)
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
def pick_anywhere(
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
        if is_near(distance_of(tl.load(tile_maximum_ptr + tile), maximum, temperature), high):
            ids = tile * TILE + tl.arange(0, TILE)
            logits = load_logits(
                *(logits_ptr, allowed_ptr, stop_ptr, ids, vocabulary, early, masked, STOPS, MASKED)
            )
            distance = distance_of(logits, maximum, temperature)
            kept = is_near(distance, high) & (tl.exp(-distance) >= min_p)
            score = tl.where(kept, tl.exp(-distance) / exponential(key, ids), -1.0)
            token = tl.where(score > best, ids, token)
            best = tl.maximum(score, best)
    winner = tl.max(best, 0)
    return tl.min(tl.where(best == winner, token, vocabulary), 0)


@triton.jit
def gather_near(groups_ptr, near_ptr, maximum, temperature, groups, PADDED: tl.constexpr, NEAR: tl.constexpr):
    """Lists at most NEAR groups, those with the largest maxima: (how many, distance + 1 bits).

    Every token nearer than that distance is in one of them.
    """
    group = tl.arange(0, PADDED)
    maxima = tl.load(groups_ptr + group, mask=group < groups, other=float("-inf"))
    distance = distance_of(maxima, maximum, temperature)
    nearest, none, nothing = _start()
    everything = tl.full([], _FARTHEST + 1, tl.int32)
    limit, _, _, _, _, _ = _narrow_near(
        *(distance, nearest, none, nothing, everything, none + groups + 2, nothing, NEAR + 1, float("inf")),
    )
    inside = is_near(distance, limit).to(tl.int32)
    tl.store(near_ptr + tl.cumsum(inside, 0) - 1, group, mask=inside > 0)
    tl.debug_barrier()  # the list is written before any of the program reads it
    return tl.sum(inside, 0), limit


@triton.jit
def pick_near(
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
    """The token of a row with a filter, from those nearer than `limit`; PENDING if that may not be all."""
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
    kept = is_near(distance, high) & (tl.exp(-distance) >= min_p)
    score = tl.where(kept, tl.exp(-distance) / exponential(key, ids), -1.0)
    best = tl.max(score, 0)
    token = tl.min(tl.where(score == best, ids, vocabulary), 0)
    return tl.where(found, token, PENDING)
