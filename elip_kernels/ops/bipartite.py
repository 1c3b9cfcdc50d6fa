"""Merge the r most similar token pairs: bipartite soft matching and a size-weighted mean.

    unit    = metric / |metric| in fp32;  A = tokens 0, 2, 4 ..;  B = tokens 1, 3, 5 ..
    best_a  = max_b unit_a . unit_b;  partner_a = its arg-max        ties: the lower index
    merged  = the r tokens of A with the largest best - penalty      ties: the lower index
    rows    = [A without merged, ascending; all of B], N - r rows; slot_n = row of token n
    S_i     = sum of size_n over slot_n = i;  w_n = size_n / S_(slot_n), 0 where that is 0
    out_i   = sum of w_n x_n over slot_n = i                         (B, N-r, D), sizes S (B, N-r)
    grad_x_n = w_n grad_out_(slot_n)

In a padded batch, all of this is for each image alone: its first tokens are real, it merges its own
number of pairs (without any, its tokens stay in order), and rows of zeros with size 0 follow, up to
the rows of the others.

Ties are ties of the computed values. The class token is in A and is never merged. Of several prefix
tokens, the last takes that place, and the others stay in front of all rows. A metric row with
NaN, or whose squared norm is not a normal number, has no direction: it ranks last as source and as
partner. A source whose penalty is NaN ranks last too. There is no gradient to metric, size and
penalty. Sums are fp32 (fp64 for fp64); the row of a single token is exact, because its w is 1. The
kernels never store the similarities, 2 B ceil(N/2) floor(N/2) C operations in tiles. They read each
token once, for its output row. No atomics are used, so results are bitwise reproducible.
Source: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, section 3.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._operator import Operator, exports_onnx
from elip_kernels._validate import check_device, check_flags, check_shape, check_tokens
from elip_kernels.autocast import without_autocast
from elip_kernels.info import BipartiteInfo, ReductionInfo, check_match
from elip_kernels.ops.bipartite_arguments import (
    check_arguments,
    check_lengths,
    check_penalty,
    check_size,
    check_size_values,
    counts_within,
)
from elip_kernels.ops.bipartite_kernels import SMALLEST_SQUARE, match
from elip_kernels.ops.gather_ops import (
    accumulator,
    add_rows,
    flat_rows,
    largest,
    sum_rows,
    sums_by,
    take_rows,
    without_nan,
)
from elip_kernels.ops.merge_kernels import merge_bwd, merge_fwd


@overload
def bipartite_merge(
    tokens: Tensor, metric: Tensor, r: int, *, size: Tensor | None = ...,
    penalty: Tensor | None = ..., lengths: Tensor | None = ..., merges: Tensor | None = ...,
    num_prefix_tokens: int = ..., return_info: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def bipartite_merge(
    tokens: Tensor, metric: Tensor, r: int, *, size: Tensor | None = ...,
    penalty: Tensor | None = ..., lengths: Tensor | None = ..., merges: Tensor | None = ...,
    num_prefix_tokens: int = ..., return_info: Literal[True],
) -> tuple[Tensor, Tensor, BipartiteInfo]: ...  # fmt: skip
@overload
def bipartite_merge(
    tokens: Tensor, metric: Tensor, r: int, *, size: Tensor | None = ...,
    penalty: Tensor | None = ..., lengths: Tensor | None = ..., merges: Tensor | None = ...,
    num_prefix_tokens: int = ..., return_info: bool,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, BipartiteInfo]: ...  # fmt: skip
def bipartite_merge(
    tokens: Tensor,
    metric: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    penalty: Tensor | None = None,
    lengths: Tensor | None = None,
    merges: Tensor | None = None,
    num_prefix_tokens: int = 1,
    return_info: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, BipartiteInfo]:
    """Merge r tokens into their most similar partners (the merging step of ToMe).

    Example::

        tokens, size = elip_kernels.bipartite_merge(tokens, keys.mean(1), 16)

    Source: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023.

    Args:
        tokens: (B, N, D), fp32, bf16, fp16 or fp64. Gradients reach tokens only.
        metric: (B, N, C), features to compare, such as the mean of the keys over heads.
        r: number of tokens to merge away, limited to (N-p) // 2. If nothing is merged, `tokens`
            itself is returned.
        size: (B, N) or (B, N, 1) fp32 or fp64, how many patches each token represents; positive,
            or zero for padding. None means 1 for each.
        penalty: (B, N) fp32 or fp64, subtracted from the similarity of a token with its partner
            when the r tokens are chosen. With a penalty of 3, a token merges after all tokens
            with penalty 0. The choice of partners ignores it.
        lengths: (B,) int64, how many tokens of each image are real; padding follows them.
        merges: (B,) int64, beside `lengths`, how many tokens each image merges away, limited to
            half of its patches; r then sets only the number of rows. None means r.
        num_prefix_tokens: p, the number of leading tokens (class token, registers) that are never
            merged and stay first.
        return_info: also return a `BipartiteInfo`.

    Returns:
        merged (B, N-r, D) in the dtype of `tokens`: the prefix tokens; then, of the half whose
            tokens may merge (every second token), those that did not; then the other half; then
            zeros for padding;
        size (B, N-r) fp32 (fp64 for fp64 tokens); with `return_info`, a `BipartiteInfo`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
    """
    check_arguments(tokens, metric, r, num_prefix_tokens)
    size, penalty = check_size(size, tokens), check_penalty(penalty, metric)
    check_lengths(lengths, merges, r, tokens)
    check_flags(return_info=return_info)
    check_size_values(size)
    if merges is None:
        r = min(r, max(0, tokens.shape[1] - num_prefix_tokens) // 2)
    merged, size, info = merge_pairs(
        tokens,
        metric,
        r,
        size=size,
        penalty=penalty,
        lengths=lengths,
        merges=merges,
        num_prefix_tokens=num_prefix_tokens,
    )
    if exports_onnx():
        info = info._replace(slots=info.slots.int())
    return (merged, size, info) if return_info else (merged, size)


def merge_pairs(
    tokens: Tensor,
    metric: Tensor,
    r: int,
    *,
    size: Tensor | None,
    penalty: Tensor | None,
    lengths: Tensor | None,
    merges: Tensor | None,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, BipartiteInfo]:
    """Merge as `bipartite_merge` does, without its checks, for callers that compute the arguments.

    r is within its limit; size (B, N) and penalty have the accumulator's dtype and no gradient.
    """
    if lengths is None and r > 0 and exports_onnx():
        return without_autocast(_merge_in_onnx)(tokens, metric, size, penalty, r, num_prefix_tokens)
    if lengths is None:
        info = _match(metric.detach(), penalty, r, num_prefix_tokens)
    else:
        matching = (metric.detach(), penalty, r, num_prefix_tokens)
        size, info = _match_padded(tokens, *matching, size, lengths, merges)
    return *_merged(tokens, size, info), info


def apply_merge(
    tokens: Tensor, info: BipartiteInfo | ReductionInfo, *, size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge other tokens with an existing match, for example positions beside features.

    Example::

        tokens, size, info = elip_kernels.bipartite_merge(tokens, keys, 16, return_info=True)
        positions, _ = elip_kernels.apply_merge(positions, info)

    Args:
        tokens: (B, N, D), fp32, bf16, fp16 or fp64. Gradients reach tokens only.
        info: result of a `bipartite_merge` or `merge_nearest` of N tokens. Its values are checked
            on the CPU, outside of graphs.
        size: (B, N) or (B, N, 1) fp32 or fp64, positive, or zero for padding. None means 1 each.

    Returns:
        merged (B, R, D) in the dtype of `tokens`, size (B, R) fp32 (fp64 for fp64 tokens).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
    """
    check_tokens(tokens)
    check_match(info)
    check_shape("tokens", tokens, (*info.slots.shape, tokens.shape[2]), "(B, N, D)")
    check_device("tokens", tokens, "info.slots", info.slots)
    size = check_size(size, tokens)
    check_size_values(size)
    return _merged(tokens, size, info)


def _merged(
    tokens: Tensor, size: Tensor | None, info: BipartiteInfo | ReductionInfo
) -> tuple[Tensor, Tensor]:
    """Return tokens and sizes after the step; `tokens` itself if nothing is merged."""
    B, N, _ = tokens.shape
    if isinstance(info, ReductionInfo) or info.num_rows != N or info.mask is not None:
        return merge_op(tokens, size, info.slots, info.num_rows)
    if size is None:
        size = tokens.new_ones(B, N, dtype=accumulator(tokens))
    return tokens, size


def _match(metric: Tensor, penalty: Tensor | None, r: int, num_prefix_tokens: int) -> BipartiteInfo:
    """Return the match of a batch without padding."""
    B, N, _ = metric.shape
    if r == 0:
        slots = torch.arange(N, dtype=torch.int32, device=metric.device).expand(B, -1)
    else:
        slots = _slots(metric, penalty, r, num_prefix_tokens)
    return BipartiteInfo(slots, N - r)


def _match_padded(
    tokens: Tensor,
    metric: Tensor,
    penalty: Tensor | None,
    r: int,
    num_prefix_tokens: int,
    size: Tensor | None,
    lengths: Tensor,
    merges: Tensor | None,
) -> tuple[Tensor, BipartiteInfo]:
    """Return the sizes (B, N), 0 for padding, and the match of a padded batch."""
    N = tokens.shape[1]
    lengths, merges = counts_within(lengths, merges, r, N, num_prefix_tokens)
    rows = torch.arange(N, device=tokens.device)
    is_real = rows < lengths[:, None]
    size = is_real.to(accumulator(tokens)) if size is None else size.masked_fill(~is_real, 0.0)
    slots = _slots(metric, penalty, r, num_prefix_tokens, lengths, merges)
    return size, BipartiteInfo(slots, N - r, rows[: N - r] < (lengths - merges)[:, None])


def _slots(
    metric: Tensor,
    penalty: Tensor | None,
    r: int,
    num_prefix_tokens: int,
    lengths: Tensor | None = None,
    merges: Tensor | None = None,
) -> Tensor:
    """Return the output row of each token (B, N) int32; all prefix tokens but the last come first.

    The op takes at most one prefix token.
    """
    first = max(num_prefix_tokens - 1, 0)
    if first == 0:
        return _match_op(metric, penalty, r, num_prefix_tokens, lengths, merges)
    penalty = None if penalty is None else penalty[:, first:]
    lengths = None if lengths is None else lengths - first
    slots = _match_op(metric[:, first:], penalty, r, 1, lengths, merges)
    stay = torch.arange(first, dtype=torch.int32, device=metric.device).expand(metric.shape[0], -1)
    return torch.cat([stay, slots + first], dim=1)


def unit_rows(metric: Tensor) -> Tensor:
    """Return metric (B, N, C) / norm in the accumulator's dtype; NaN if there is no direction."""
    metric = metric.to(accumulator(metric))
    norm = torch.linalg.vector_norm(metric, dim=2, keepdim=True)
    normal = norm.clamp(SMALLEST_SQUARE**0.5, torch.finfo(norm.dtype).max)
    return metric / torch.where(norm == normal, norm, float("nan"))


def match_reference(
    metric: Tensor,
    penalty: Tensor | None,
    r: int,
    num_prefix_tokens: int,
    lengths: Tensor | None = None,
    merges: Tensor | None = None,
) -> Tensor:
    """Compute the matching in PyTorch; return slots (B, N) int32."""
    B, N, _ = metric.shape
    num_a, first_b = (N + 1) // 2, (N + 1) // 2 - r
    unit, tokens = unit_rows(metric), torch.arange(N, device=metric.device)
    if lengths is not None:
        is_real = tokens < lengths[:, None]
        unit = unit.masked_fill(~is_real[..., None], float("nan"))
        first_b = ((lengths + 1) // 2 - merges)[:, None]
    penalty = None if penalty is None else penalty[:, ::2]
    best, partner = _partners(unit[:, ::2], unit[:, 1::2], penalty)
    is_merged = best.new_zeros(B, num_a, dtype=torch.bool)
    if lengths is None:
        merged = largest(best[:, num_prefix_tokens:], r)
        is_merged = is_merged.scatter(1, merged + num_prefix_tokens, 1)  # TorchScript has no bool
    else:  # padding has no direction, and the highest indices
        rank = largest(best[:, num_prefix_tokens:], num_a).argsort(1)
        is_merged[:, num_prefix_tokens:] = rank < merges[:, None]
    rows = torch.arange(num_a, device=metric.device)
    slots_a = torch.where(is_merged, first_b + partner, rows - is_merged.cumsum(1))
    slots_b = (first_b + rows).expand_as(slots_a)
    # a slice in place of index_select would limit an exported graph to odd or even N
    pairs = torch.stack([slots_a, slots_b], dim=2).flatten(1).to(torch.int32)
    slots = pairs.index_select(1, tokens)
    if lengths is not None:
        slots = torch.where(merges[:, None] == 0, tokens, slots)
        slots = slots.clamp(max=N - r - 1).masked_fill(~is_real, N - r - 1).to(torch.int32)
    return slots


def _partners(unit_a: Tensor, unit_b: Tensor, penalty: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return best - penalty and partner, both (B, A), of unit_a (B, A, C) among unit_b."""
    best, partner = without_nan(torch.bmm(unit_a, unit_b.mT)).max(2)
    if penalty is not None:
        best = best - penalty
        best = best.masked_fill(best.isnan(), float("-inf"))
    return best, partner


def _merge_in_onnx(
    tokens: Tensor,
    metric: Tensor,
    size: Tensor | None,
    penalty: Tensor | None,
    r: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, BipartiteInfo]:
    """Match and merge with few nodes, the same result as that of the two ops.

    Gather all tokens in the order of their rows, the r merged ones last, and add these to theirs.
    The slots are int64, which later nodes read without a cast.
    """
    (B, N, _), p, device = tokens.shape, num_prefix_tokens, tokens.device
    of_a = torch.arange(p + 1 if p else 0, N, 2, device=device)
    of_b = torch.arange(p or 1, N, 2, device=device)
    A, R = of_a.shape[0], N - r
    unit = unit_rows(metric.detach())
    penalty = None if penalty is None else penalty.index_select(1, of_a)
    best, partner = _partners(unit.index_select(1, of_a), unit.index_select(1, of_b), penalty)
    merged, kept = largest(best, A).split([r, A - r], dim=1)
    targets = partner.gather(1, merged) + (R - of_b.shape[0])
    kept = kept.topk(A - r, largest=False).values
    others = torch.arange(A, N, device=device).expand(B, -1)  # prefix and B, after A
    order = torch.cat([others[:, :p], kept, others[:, p:], merged], dim=1)
    places = torch.cat([of_a, torch.arange(p, device=device), of_b])
    order = places.expand(B, -1).gather(1, order)
    rows = torch.cat([torch.arange(R, device=device).expand(B, -1), targets], dim=1)
    if size is None:
        size = tokens.new_ones(B, N, dtype=accumulator(tokens))
    else:
        size = size.gather(1, order)
    out_size = size.new_zeros(B, R).scatter_add(1, rows, size)
    divisor = out_size.clamp(min=torch.finfo(out_size.dtype).tiny)  # one node, for normal sizes
    weight = size / divisor.gather(1, rows)
    out, added = (take_rows(tokens, order) * weight[..., None]).split([R, r], dim=1)
    out = out.scatter_add(1, targets[..., None].expand_as(added), added).to(tokens.dtype)
    return out, out_size, BipartiteInfo(torch.zeros_like(order).scatter(1, order, rows), R)


def merge_reference(
    tokens: Tensor, size: Tensor | None, slots: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Compute the merge in PyTorch; return out (B, R, D) and sizes (B, R)."""
    (B, N, D), rows = tokens.shape, flat_rows(slots, num_rows)
    if size is None:
        size = tokens.new_ones(B, N, dtype=accumulator(tokens))
    size = size.reshape(B * N, 1)
    out_size = sums_by(rows, size, B * num_rows)
    weight = size / _divisor(out_size).index_select(0, rows)
    out = sums_by(rows, tokens.reshape(B * N, D) * weight, B * num_rows)
    return out.to(tokens.dtype).view(B, num_rows, D), out_size.view(B, num_rows)


def merge_backward_reference(
    grad_out: Tensor, size: Tensor | None, out_size: Tensor, slots: Tensor
) -> Tensor:
    """Return grad_tokens (B, N, D) from grad_out (B, R, D)."""
    return sum_rows(grad_out, slots[..., None], shares(size, out_size, slots)[..., None])


def shares(size: Tensor | None, out_size: Tensor, slots: Tensor) -> Tensor:
    """Return w (B, N), the share of each token in its row."""
    total = _divisor(out_size).gather(1, slots.long())
    return total.reciprocal() if size is None else size / total


def _divisor(out_size: Tensor) -> Tensor:
    """Return `out_size`, and 1 for empty rows, whose numerators are zero."""
    return torch.where(out_size == 0, 1, out_size)


def _match_flops(metric_shape, *args, **kwargs) -> int:
    """Return a multiply and an add for each channel of each pair."""
    B, N, C = metric_shape
    return 2 * B * ((N + 1) // 2) * (N // 2) * C


def _merge_fake(tokens, size, slots, num_rows):
    B, _, D = tokens.shape
    sums = accumulator(tokens)
    return tokens.new_empty(B, num_rows, D), tokens.new_empty(B, num_rows, dtype=sums)


def _save_for_backward(ctx, inputs, output) -> None:
    _, size, slots, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(size, output[1], slots)


def _backward(ctx, grad_out, _):
    return _merge_backward_op(grad_out, *ctx.saved_tensors), None, None, None


def _save_shares(ctx, inputs, output) -> None:
    ctx.R = inputs[0].shape[1]
    ctx.save_for_backward(*inputs[1:])


def _backward_of_backward(ctx, grad):
    """Merge `grad` with the same rows and shares, because the backward is linear in grad_out."""
    slots = ctx.saved_tensors[2]
    return add_rows(grad, slots, shares(*ctx.saved_tensors), ctx.R), None, None, None


def _merge_flops(tokens_shape, *args, **kwargs) -> int:
    """Return a multiply and an add for each element of a token."""
    B, N, D = tokens_shape
    return 2 * B * N * D


def _merge_backward_flops(grad_shape, size_shape, out_size_shape, slots_shape, **kwargs) -> int:
    """Return a multiply for each element of a token."""
    return grad_shape[2] * slots_shape[0] * slots_shape[1]


_match_op = Operator(
    "bipartite_match",
    match_reference,
    launcher=match,
    unsupported=lambda metric, *more: launch.unsupported(
        metric,
        candidates=metric.shape[1] - 1,
        most=None if more[3:4] in ((), (None,)) else 2 * launch.MAX_SELECTED,
    ),
    fake=lambda metric, *_: metric.new_empty(metric.shape[:2], dtype=torch.int32),
    flops=_match_flops,
)


merge_op = Operator(
    "bipartite_merge",
    merge_reference,
    launcher=merge_fwd,
    unsupported=lambda tokens, size, slots, _: launch.unsupported(
        tokens, candidates=slots.shape[1] - 1
    ),
    fake=_merge_fake,
    flops=_merge_flops,
    backward=_backward,
    save=_save_for_backward,
)
_merge_backward_op = Operator(
    "bipartite_merge_backward",
    merge_backward_reference,
    launcher=merge_bwd,
    unsupported=lambda grad_out, *_: launch.unsupported(grad_out),
    fake=lambda grad_out, size, out_size, slots: grad_out.new_empty(
        *slots.shape, grad_out.shape[2]
    ),
    flops=_merge_backward_flops,
    backward=_backward_of_backward,
    save=_save_shares,
)


@example_of(bipartite_merge)
def _example(sizes: Sizes) -> Arguments:
    metric = sizes.images(sizes.N, sizes.D // sizes.H)
    arguments = {"tokens": sizes.tokens(), "metric": metric, "r": sizes.N - sizes.K}
    arguments |= {"size": sizes.token_counts(), "penalty": torch.rand(sizes.B, sizes.N)}
    return arguments | {"return_info": True}


@example_of(apply_merge)
def _example_of_apply(sizes: Sizes) -> Arguments:
    slots = torch.arange(sizes.N, dtype=torch.int32).expand(sizes.B, -1) % sizes.K
    info = BipartiteInfo(slots, sizes.K)
    return {"tokens": sizes.tokens(), "info": info, "size": sizes.token_counts()}
