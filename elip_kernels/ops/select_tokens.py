"""Select the K most attended tokens in image order, as `reduce` does, without moving them.

    scores a (B, N-p), p prefix tokens first
    kept   = p + the K largest a, ascending; ties: the lower index; NaN after all numbers, padding
             last                                                            (B, K) int64

Traffic: one program per image reads the scores and writes the positions.
Source: ELIP, Eq. 3.
"""

import torch
from torch import Tensor

from elip_kernels import launch
from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._operator import Operator
from elip_kernels._validate import (
    candidate_scores,
    check_keep,
    check_mask,
    check_prefix,
    check_tensor,
)
from elip_kernels.ops.gather_ops import accumulator, places
from elip_kernels.ops.select_kernels import launch_select


def select_tokens(
    attn: Tensor, keep: int | float, *, mask: Tensor | None = None, num_prefix_tokens: int = 1
) -> Tensor:
    """Return the positions of the `keep` most attended tokens, in image order (ELIP, Eq. 3).

    `reduce` keeps the same tokens. Example::

        kept = elip_kernels.select_tokens(attn, 0.5)  # (B, 12, 197) -> (B, 98)

    Args:
        attn: scores (B, N), whose first p are not read; or attention rows (B, H, N) or a whole map
            (B, H, N, N), whose CLS row is averaged over heads. fp32, bf16, fp16 or fp64.
        keep: int, a count; or float, a ratio r in (0, 1] of the N-p candidates,
            max(1, int(r * (N-p))).
        mask: (B, N) bool, True = real. Padding comes last.
        num_prefix_tokens: p, the number of leading tokens that are not candidates.

    Returns:
        kept (B, K) int64, positions from p to N-1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
    """
    check_tensor("attn", attn, "(B, N), (B, H, N) or (B, H, N, N)", (2, 3, 4))
    (B, *_, N), p = attn.shape, num_prefix_tokens
    check_prefix(p, N)
    check_mask(mask, (B, N), "attn", attn)
    scores = candidate_scores(attn, B, N, p)
    keep = check_keep(keep, N - p)
    return _select_op(scores, None if mask is None else mask[:, p:], keep, p)


def select_reference(
    scores: Tensor, real: Tensor | None, keep: int, num_prefix_tokens: int
) -> Tensor:
    """Compute the selection in PyTorch: kept (B, K) int64 from scores and real (B, N-p)."""
    B, candidates = scores.shape
    place = places(scores.to(accumulator(scores)), real, keep)
    index = torch.arange(num_prefix_tokens, num_prefix_tokens + candidates, device=scores.device)
    order = place.scatter(1, place, index.expand(B, -1))
    return order[:, :keep].clone(memory_format=torch.contiguous_format)


def _select(scores: Tensor, real: Tensor | None, keep: int, num_prefix_tokens: int) -> Tensor:
    """Allocate and launch."""
    B = scores.shape[0]
    scores, real = launch.dense_rows(scores, real)
    kept = scores.new_empty(B, keep, dtype=torch.int64)
    launch_select(scores, real, kept, num_prefix_tokens=num_prefix_tokens)
    return kept


_select_op = Operator(
    "select",
    select_reference,
    launcher=_select,
    unsupported=lambda scores, *_: launch.unsupported(scores, candidates=scores.shape[1]),
    fake=lambda scores, real, keep, _: scores.new_empty(scores.shape[0], keep, dtype=torch.int64),
    flops=lambda *shapes, **kwargs: 0,
)


@example_of(select_tokens)
def _example(sizes: Sizes) -> Arguments:
    return {"attn": sizes.images(sizes.N), "keep": sizes.K}
