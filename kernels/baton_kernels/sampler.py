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

from baton_kernels.filters import (
    PENDING,
    distance_of,
    gather_near,
    is_filtered,
    is_near,
    load_logits,
    pick_anywhere,
    pick_near,
    restrict,
)
from baton_kernels.noise import exponential, noise_key

NOT_FINITE = -1  # sampled where the logits have no finite maximum
_TILE = 4096
_GROUP = 64  # tokens of a group
_NEAR_GROUPS = 64  # groups gathered
_FINISH_WARPS = 4


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
    logits = restrict(
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
        if is_filtered(temperature, top_k, top_p, min_p, vocabulary):
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
    """One program, one row: writes the token, NOT_FINITE or PENDING at the row's slot."""
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
    elif is_filtered(temperature, top_k, top_p, min_p, vocabulary):
        length = tl.load(length_ptr + slot).to(tl.int64)
        mask_row = tl.load(mask_row_ptr + row) if MASKED else 0
        groups = tiles * (TILE // GROUP)
        near_ptr += row * NEAR
        gathered, limit = gather_near(
            *(groups_ptr + row * groups, near_ptr, maximum, temperature, groups),
            *(TILES_PADDED * (TILE // GROUP), NEAR),
        )
        index = tl.arange(0, NEAR * GROUP)
        group = tl.load(near_ptr + index // GROUP, mask=index < gathered * GROUP, other=groups)
        ids = group * GROUP + index % GROUP
        logits = load_logits(
            *(logits_ptr + row.to(tl.int64) * logits_stride, allowed_ptr + mask_row * allowed_stride),
            *(stop_ptr + slot * STOPS, ids, vocabulary, length < tl.load(min_length_ptr + slot)),
            *(mask_row >= 0, STOPS, MASKED),
        )
        distance = distance_of(logits, maximum, temperature)
        distance = tl.where(is_near(distance, limit), distance, float("inf"))
        all_weight = tl.sum(tl.where(maxima > float("-inf"), best * tl.exp(above), 0.0), 0)
        key = noise_key(tl.load(seed_ptr + slot), length)
        token = pick_near(distance, ids, limit, all_weight, vocabulary, top_k, top_p, min_p, key)
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
    """One program, one row: writes the token of a row that is PENDING."""
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if slot < 0:
        return
    if tl.load(sampled_ptr + slot) != PENDING:
        return
    tile = tl.arange(0, TILES_PADDED)
    maximum = tl.max(tl.load(maximum_ptr + row * tiles + tile, mask=tile < tiles, other=float("-inf")), 0)
    length = tl.load(length_ptr + slot).to(tl.int64)
    mask_row = tl.load(mask_row_ptr + row) if MASKED else 0
    token = pick_anywhere(
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
