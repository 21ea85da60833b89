"""Attention over paged keys and values, in three kernels that one layer launches in this order.

Rows of a tile are pairs (query, head): QUERIES of one sequence times HEADS of those that share a
key-value head, so one load of a key serves them all. D is padded to DIM, a power of two.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

LOG2_E = 1.4426950408889634  # exp2 is what the hardware has


@triton.jit
def store_kernel(
    q: tensor, k: tensor, v: tensor, cos: tensor, sin: tensor, slots: tensor, turned: tensor,
    k_cache: tensor, v_cache: tensor,
    q_stride: tensor, k_stride: tensor, v_stride: tensor,
    K: constexpr, GROUP: constexpr, D: constexpr, SIZE: constexpr,
    HEADS: constexpr, HALF: constexpr,
) -> None:  # fmt: skip
    """Program (token, key-value head): turn its queries into `turned` and its key into the cache,
    and copy its value there; slot -1 stores nothing.

    Args:
        q, k, v: [T, heads, D], tokens a stride apart. cos, sin: [T, D]. turned: [T, N, D].
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim, group = tl.arange(0, HALF), tl.arange(0, HEADS)
    half: constexpr = D // 2
    inside = dim < half
    cos_low = tl.load(cos + token * D + dim, inside, 0).to(tl.float32)
    sin_low = tl.load(sin + token * D + dim, inside, 0).to(tl.float32)
    cos_high = tl.load(cos + token * D + half + dim, inside, 0).to(tl.float32)
    sin_high = tl.load(sin + token * D + half + dim, inside, 0).to(tl.float32)

    place = (head * GROUP + group)[:, None] * D + dim[None, :]
    mask = (group < GROUP)[:, None] & inside[None, :]
    low = tl.load(q + token * q_stride + place, mask, 0).to(tl.float32)
    high = tl.load(q + token * q_stride + half + place, mask, 0).to(tl.float32)
    target = turned + token * (K * GROUP * D) + place
    dtype: constexpr = turned.dtype.element_ty
    turned_low = low * cos_low[None, :] - high * sin_low[None, :]
    turned_high = high * cos_high[None, :] + low * sin_high[None, :]
    tl.store(target, turned_low.to(dtype), mask)
    tl.store(target + half, turned_high.to(dtype), mask)

    slot = tl.load(slots + token).to(tl.int64)
    kept = dim < tl.where(slot >= 0, half, 0)
    low = tl.load(k + token * k_stride + head * D + dim, kept, 0).to(tl.float32)
    high = tl.load(k + token * k_stride + head * D + half + dim, kept, 0).to(tl.float32)
    slot_place = ((slot // SIZE * K + head) * SIZE + slot % SIZE) * D + dim
    tl.store(k_cache + slot_place, (low * cos_low - high * sin_low).to(dtype), kept)
    tl.store(k_cache + slot_place + half, (high * cos_high + low * sin_high).to(dtype), kept)
    value = v + token * v_stride + head * D + dim
    tl.store(v_cache + slot_place, tl.load(value, kept), kept)
    tl.store(v_cache + slot_place + half, tl.load(value + half, kept), kept)


@triton.jit(do_not_specialize=["table_width", "window"])
def attend_kernel(
    q: tensor, k_cache: tensor, v_cache: tensor, tiles: tensor, starts: tensor, lengths: tensor,
    tables: tensor, out: tensor, partial: tensor, sums: tensor, table_width: tensor,
    window: tensor, scale: tensor,
    K: constexpr, GROUP: constexpr, D: constexpr, SIZE: constexpr, DIM: constexpr,
    QUERIES: constexpr, HEADS: constexpr, KEYS: constexpr, SPLITS: constexpr,
    FACTOR: constexpr,
) -> None:  # fmt: skip
    """Program (tile, heads, split): a tile's queries over its split of their context, KEYS at a
    time, with the softmax kept up as they come (Milakov & Gimelshein, 2018; Dao et al.,
    FlashAttention, 2022).

    Args:
        q, out: [T, N, D]. tiles: [tiles, 3] sequence, its first query, keys of each split.
        starts, lengths, tables: as AttentionBatch has them, int32.
        partial, sums: [tiles, HEADS parts, SPLITS, rows, D] and [..., rows] float32: the results
            of the splits and log2 of their softmax's denominators, where SPLITS is not 1.
        window: positions seen, from a token's own one back; 2^31 - 1 is all.
        scale: of the scores, times LOG2_E.
        FACTOR: the dtype of what is multiplied.
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    PARTS: constexpr = (GROUP + HEADS - 1) // HEADS
    head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    sequence, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
    split_keys = tl.load(tiles + 3 * tile + 2)
    start, length = tl.load(starts + sequence), tl.load(lengths + sequence)
    count = tl.load(starts + sequence + 1) - start

    row, dim, step = tl.arange(0, QUERIES * HEADS), tl.arange(0, DIM), tl.arange(0, KEYS)
    query, member = first + row // HEADS, part * HEADS + row % HEADS
    valid = ((query < count) & (member < GROUP))[:, None] & (dim < D)[None, :]
    row_place = (start + query).to(tl.int64) * (K * GROUP) + head * GROUP + member
    place = row_place[:, None] * D + dim[None, :]
    queries = tl.load(q + place, valid, 0).to(FACTOR)
    position = length - count + query

    lowest = tl.maximum(length - count + first + 1 - window, 0) // KEYS * KEYS
    begin = lowest + split * split_keys
    end = tl.minimum(begin + split_keys, length - count + tl.minimum(first + QUERIES, count))
    peak = tl.full((QUERIES * HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES * HEADS,), tl.float32)
    mixed = tl.zeros((QUERIES * HEADS, DIM), tl.float32)
    table = tables + sequence.to(tl.int64) * table_width
    for first_key in range(begin, end, KEYS):
        key = first_key + step
        block = tl.load(table + key // SIZE, key < end, 0).to(tl.int64)
        key_place = ((block * K + head) * SIZE + key % SIZE)[:, None] * D + dim[None, :]
        known = (key < end)[:, None] & (dim < D)[None, :]
        keys = tl.load(k_cache + key_place, known, 0).to(FACTOR)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen & (key < end)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights, decay = tl.exp2(scores - shift[:, None]), tl.exp2(peak - shift)
        values = tl.load(v_cache + key_place, known, 0).to(FACTOR)
        added = tl.dot(weights.to(FACTOR), values, input_precision="ieee")
        mixed = mixed * decay[:, None] + added
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak

    total = tl.where(total == 0, 1.0, total)
    mixed = mixed / total[:, None]
    if SPLITS == 1:
        tl.store(out + place, mixed.to(out.dtype.element_ty), valid)
    else:
        group = (tile.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * SPLITS + split
        kept = group * (QUERIES * HEADS) + row
        written = valid & (peak > float("-inf"))[:, None]  # a split may lie past the context
        tl.store(partial + kept[:, None] * D + dim[None, :], mixed, written)
        tl.store(sums + kept, peak + tl.log2(total))


@triton.jit
def combine_kernel(
    tiles: tensor, starts: tensor, out: tensor, partial: tensor, sums: tensor,
    K: constexpr, GROUP: constexpr, D: constexpr, DIM: constexpr,
    QUERIES: constexpr, HEADS: constexpr, SPLITS: constexpr,
) -> None:  # fmt: skip
    """Program (tile, heads): the results of its splits, weighted by their denominators (Dao et
    al., Flash-Decoding, 2023). Arguments as in attend_kernel."""
    tile = tl.program_id(0)
    PARTS: constexpr = (GROUP + HEADS - 1) // HEADS
    head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    sequence, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    row, dim = tl.arange(0, QUERIES * HEADS), tl.arange(0, DIM)
    query, member = first + row // HEADS, part * HEADS + row % HEADS
    valid = ((query < count) & (member < GROUP))[:, None] & (dim < D)[None, :]

    group = (tile.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * SPLITS
    peak = tl.full((QUERIES * HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES * HEADS,), tl.float32)
    mixed = tl.zeros((QUERIES * HEADS, DIM), tl.float32)
    for split in range(SPLITS):
        kept = (group + split) * (QUERIES * HEADS) + row
        log_sum = tl.load(sums + kept)
        new_peak = tl.maximum(peak, log_sum)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight, decay = tl.exp2(log_sum - shift), tl.exp2(peak - shift)
        written = valid & (log_sum > float("-inf"))[:, None]
        result = tl.load(partial + kept[:, None] * D + dim[None, :], written, 0)
        mixed = mixed * decay[:, None] + result * weight[:, None]
        total = total * decay + weight
        peak = new_peak
    mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
    row_place = (start + query).to(tl.int64) * (K * GROUP) + head * GROUP + member
    tl.store(out + row_place[:, None] * D + dim[None, :], mixed.to(out.dtype.element_ty), valid)
