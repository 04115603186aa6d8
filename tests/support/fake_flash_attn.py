"""The two functions of flash-attn 2 that the worker calls, in plain torch, by their documentation.

Refuses what the package refuses. Rows that it leaves as they were in memory are NaN here. To be put into
`sys.modules` as `flash_attn`.
"""

import torch

DTYPES = {torch.float16, torch.bfloat16}
PAGE_MULTIPLE = 256


def _require(holds, what):
    if not holds:
        raise RuntimeError(what)


def _check(q, k_cache, v_cache, block_table, batch):
    """What both functions ask of their arguments."""
    _require(q.dtype in DTYPES, "FlashAttention only support fp16 and bf16 data type")
    _require(k_cache.dtype == v_cache.dtype == q.dtype, "query, key and value must have the same dtype")
    _require(all(x.stride(-1) == 1 for x in (q, k_cache, v_cache)), "contiguous last dimension")
    _require(block_table.dtype == torch.int32 and block_table.stride(-1) == 1, "block_table")
    _, page, kv_heads, head_dim = k_cache.shape
    heads = q.shape[-2]
    _require(page % PAGE_MULTIPLE == 0, "Paged KV cache block size must be divisible by 256")
    _require(head_dim <= 256, "FlashAttention forward only supports head dimension at most 256")
    _require(head_dim % 8 == 0, "the cache would be copied to pad it")
    _require(heads % kv_heads == 0, "heads in key/value must divide heads in query")
    _require(q.shape[-1] == head_dim and v_cache.shape == k_cache.shape, "shapes of q, k, v")
    _require(block_table.shape[0] == batch, "shape of block_table")


def _lengths(lengths, size):
    _require(lengths.dtype == torch.int32 and lengths.is_contiguous(), "lengths: int32, contiguous")
    _require(lengths.shape == (size,), "shape of lengths")
    return lengths.tolist()


def _attend(q, k_cache, v_cache, blocks, seen, scale, causal):
    """[rows, heads, head_dim] of one sequence; its last row is at the last of `seen` positions if causal."""
    page = k_cache.shape[1]
    used = blocks[: -(-seen // page)].long()
    _require(len(used) * page >= seen, "a sequence is longer than its row of block_table")
    _require(((used >= 0) & (used < len(k_cache))).all(), "a block that is not there")
    rows, heads, _ = q.shape
    group = heads // k_cache.shape[2]
    k, v = (x[used].flatten(0, 1)[:seen].float().repeat_interleave(group, 1) for x in (k_cache, v_cache))
    scores = torch.einsum("rhd,nhd->hrn", q.float(), k) * scale
    if causal:
        last = torch.arange(rows)[:, None] + seen - rows
        scores = scores.masked_fill((torch.arange(seen) > last).to(q.device), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)  # a row that sees nothing gives zeros
    return torch.einsum("hrn,nhd->rhd", weights, v).to(q.dtype)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """[batch, rows, heads, head_dim] for q of that shape; without new keys, rotation, windows."""
    _require(k is v is rotary_cos is cache_batch_idx is cache_leftpad is alibi_slopes is None, "not faked")
    _require(not return_softmax_lse and window_size == (-1, -1) and softcap == 0, "not faked")
    batch = len(q)
    _check(q, k_cache, v_cache, block_table, batch)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    seen = _lengths(cache_seqlens, batch)
    parts = [
        _attend(q[i], k_cache, v_cache, block_table[i], n, scale, causal and q.shape[1] > 1)
        for i, n in enumerate(seen)
    ]
    return torch.stack(parts)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """[rows, heads, head_dim] for q of that shape; k, v: a paged cache."""
    _require(alibi_slopes is None and not return_attn_probs and dropout_p == 0, "not faked")
    _require(window_size == (-1, -1) and softcap == 0, "not faked")
    _require(
        isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int), "bounds are numbers of the host"
    )
    batch = len(cu_seqlens_q) - 1
    _require(batch > 0, "batch size must be positive")
    _check(q, k, v, block_table, batch)
    if max_seqlen_q == 1 and q.shape[1] > k.shape[2]:
        _require(len(q) == batch, "by this bound every sequence has exactly one row")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    ends_q, ends_k = (_lengths(x, batch + 1) for x in (cu_seqlens_q, cu_seqlens_k))
    _require(ends_q[0] == ends_k[0] == 0 and ends_q[-1] <= len(q), "cumulative lengths")
    out = torch.full_like(q, torch.nan)
    for i in range(batch):
        first, last, seen = ends_q[i], ends_q[i + 1], ends_k[i + 1] - ends_k[i]
        _require(0 <= last - first <= max_seqlen_q and 0 <= seen <= max_seqlen_k, "beyond a bound")
        out[first:last] = _attend(q[first:last], k, v, block_table[i], seen, scale, causal)
    return out
