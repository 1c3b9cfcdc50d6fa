"""Device functions for selection and movement that several kernels share.

A score becomes a uint32 key. Keys order the candidates for selection: larger floats first, -0.0
equals +0.0, NaN after every number, padding after NaN, then lanes without a candidate. The K-th
largest key is found by bisection on the keys. Of the candidates that equal it, those with the
lowest indices are kept. One packed cumulative sum gives each kept candidate its output row, in
image order.
"""

from elip_kernels._triton import tl, triton

OUTSIDE_KEY = tl.constexpr(0)
PADDING_KEY = tl.constexpr(1)
NAN_KEY = tl.constexpr(2)
SUM_SCALE = 2.0**-17  # factor of scores in sums, so that no sum of 65,536 of them overflows
SCALE = tl.constexpr(SUM_SCALE)
LEAST_SUM = 1e-6  # added to the sum of the dropped scores (ELIP, Eq. 4)
EPSILON = tl.constexpr(LEAST_SUM)


@triton.jit
def order_key(score, is_real, is_inside):
    """Return uint32 keys [BLOCK_N] from fp32 scores and the masks is_real and is_inside."""
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(score != score, NAN_KEY, key)
    key = tl.where(is_real, key, PADDING_KEY)
    return tl.where(is_inside, key, OUTSIDE_KEY)


@triton.jit
def kth_largest(key, K):
    """Return the K-th largest of the keys [BLOCK_N]; stop once exactly K keys reach the middle."""
    hi = tl.max(key, 0)
    lo = tl.min(tl.where(key == OUTSIDE_KEY, hi, key), 0)
    while lo < hi:
        mid = lo + ((hi - lo) >> 1) + 1
        count = tl.sum((key >= mid).to(tl.int32), 0)
        lo = tl.where(count >= K, mid, lo)
        hi = tl.where(count == K, mid, tl.where(count > K, hi, mid - 1))
    return lo


@triton.jit
def kept_among(key, threshold, above_before, equal_before, quota, K):
    """Return is_kept (bool) and slot (int32) [BLOCK_N], in image order; kept padding comes last.

    Among the keys before these, `above_before` are larger than the K-th largest key and
    `equal_before` equal it. Among all keys, `quota` equal ones are kept.
    """
    above = (key > threshold).to(tl.int32)
    equal = (key == threshold).to(tl.int32)
    packed = above | (equal << 16)
    before = tl.cumsum(packed, 0) - packed
    above_before += before & 0xFFFF
    equal_before += before >> 16
    is_kept = (above == 1) | ((equal == 1) & (equal_before < quota))
    in_order = above_before + tl.minimum(equal_before, quota)
    padding_last = tl.where(equal == 1, K - quota + equal_before, above_before)
    return is_kept, tl.where(threshold == PADDING_KEY, padding_last, in_order)


@triton.jit
def output_slots(key, threshold, K):
    """Return `kept_among` for all keys of an image."""
    quota = K - tl.sum((key > threshold).to(tl.int32), 0)
    return kept_among(key, threshold, 0, 0, quota, K)


@triton.jit
def part_and_slice(pid, D, BLOCK_D: tl.constexpr):
    """Return the part of the batch and the slice of D; slices of a part are neighbours."""
    slices = tl.cdiv(D, BLOCK_D)
    return pid // slices, pid % slices


@triton.jit
def zero_rows(x, is_read):
    """Zero the rows of x that are not read, even NaN; bit operations save 15 registers."""
    integer: tl.constexpr = tl.int16 if x.dtype.primitive_bitwidth == 16 else tl.int32
    bits = tl.where(is_read, -1, 0).to(integer)
    return (x.to(integer, bitcast=True) & bits[:, None]).to(x.dtype, bitcast=True)


@triton.jit
def select_and_weigh(score, is_real, is_inside, K, MERGE: tl.constexpr):
    """Apply Eq. 3-4 to scores [BLOCK_N]; return is_kept, slot, and weights (0 if kept)."""
    key = order_key(score, is_real, is_inside)
    is_kept, slot = output_slots(key, kth_largest(key, K), K)
    weight = tl.zeros_like(score)
    if MERGE:
        is_merged = is_inside & is_real & (tl.abs(score) < float("inf")) & (is_kept == 0)
        weight = tl.where(is_merged, score, 0.0)
        weight = weight / (tl.sum(weight * SCALE, 0) + EPSILON * SCALE) * SCALE
    return is_kept, slot, weight


@triton.jit
def store_selection(
    kept_ptr, weights_ptr, slots_ptr, is_kept, slot, weight, offs_n, mask_n, pid_b, N, K,
    P: tl.constexpr,
):  # fmt: skip
    """Store positions, weights and rows of candidates; only positions if `weights_ptr` is None."""
    row = pid_b * N + P + offs_n
    tl.store(kept_ptr + pid_b * K + slot, (P + offs_n).to(tl.int64), mask=is_kept)
    if weights_ptr is not None:
        tl.store(weights_ptr + row, weight, mask=mask_n)
        tl.store(slots_ptr + row, P + tl.where(is_kept, slot, K), mask=mask_n)


@triton.jit
def store_prefix(weights_ptr, slots_ptr, pid_b, N, P: tl.constexpr):
    """Store weights and output rows of the prefix tokens of an image."""
    if weights_ptr is not None:
        for i in tl.static_range(P):
            tl.store(weights_ptr + pid_b * N + i, 0.0)
            tl.store(slots_ptr + pid_b * N + i, i)


@triton.jit
def load_tile(tokens_ptr, stride_tn, offs_n, offs_d, mask_n, mask_d, P: tl.constexpr):
    """Load candidates `offs_n` of an image, counted from 0 [BLOCK_N, BLOCK_D]; 0 where masked."""
    return tl.load(
        tokens_ptr + (P + offs_n)[:, None] * stride_tn + offs_d[None, :],
        mask=mask_n[:, None] & mask_d[None, :],
        other=0.0,
    )


@triton.jit
def move_tile(
    tokens_ptr, out_ptr, x, is_kept, slot, weight, stride_tn, offs_d, mask_d, K, D,
    P: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Store prefix tokens, kept candidates x [BLOCK_N, BLOCK_D] and the merged token."""
    for i in tl.static_range(P):
        prefix = tl.load(tokens_ptr + i * stride_tn + offs_d, mask=mask_d)
        tl.store(out_ptr + i * D + offs_d, prefix, mask=mask_d)
    tl.store(
        out_ptr + (P + slot)[:, None] * D + offs_d[None, :],
        x,
        mask=is_kept[:, None] & mask_d[None, :],
    )
    if MERGE:
        share = zero_rows(x, weight != 0).to(tl.float32) * weight[:, None]
        merged = tl.sum(share, 0)  # [BLOCK_D]
        tl.store(out_ptr + (P + K) * D + offs_d, merged.to(x.dtype), mask=mask_d)
