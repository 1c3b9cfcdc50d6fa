"""Padded batches: images of different sizes, each with its own number of patches.

    tokens (B, N0, D) with a mask  ->  (B, N, D), real tokens first; N is that of the longest image
    image b, of n_b patches, keeps after block i what the strategy keeps of n_b patches alone

Padding has size 0, so that no token attends to it, and it never merges. After the last block, each
token of the batch gets its own token back, and padding gets zeros: the model's head reads its own
mask. A graph cannot read the mask, so there N is N0.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from elip_kernels.ops.gather_ops import take_rows
from elip_models.engine.step_plan import keeps_of
from elip_models.strategies.strategy import Strategy
from elip_models.strategies.token_assignment import Slots
from elip_models.towers import Tower, TowerSize

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
BLOCK_MASKS = ("attn_mask", "attention_mask")


class Padding(NamedTuple):
    """The real tokens of one batch, and how many patches its images keep.

    order: (B, N) the positions in the batch of each image's tokens, real ones first.
    mask: (B, N) bool, False for padding.
    slots: where the tokens of the batch are after `packed`.
    keeps: (B, depth) the patches of each image after each block.
    most: the largest of them, by block.
    """

    order: Tensor
    mask: Tensor
    slots: Slots
    keeps: Tensor
    most: tuple[int, ...]

    def packed(self, tokens: Tensor) -> Tensor:
        """Return the tokens (B, N, D) of (B, N0, D), real ones first."""
        return take_rows(tokens, self.order)

    def positions(self, p: int) -> Tensor:
        """Return the positions (B, N-p) of the patches, behind p prefix tokens."""
        return self.order[:, p:] - p


def padding_for(
    strategy: Strategy, tower: Tower, size: TowerSize, real: Tensor
) -> tuple[Padding, int] | None:
    """Return the padding of a batch, and the patches of its longest image; None without padding.

    Args:
        strategy: the strategy that reduces the batch.
        tower: the tower that reads it.
        size: that of the forward pass.
        real: (B, N) bool, False for padding.

    Raises:
        ValueError: a strategy that takes no padding, or an image without a real patch.
    """
    p, lengths, N = size.num_prefix_tokens, real.sum(1), real.shape[1]
    if strategy.merge == "none" and tower.pools:
        raise ValueError(
            "strategy: expected one that merges, since the model pools patches by its own "
            f"mask, got {strategy.name!r} with merge='none', which drops some of them"
        )
    if is_graph():
        counts = tuple(range(N - p + 1))
    else:
        counts = tuple(length - p for length in lengths.tolist())
        if all(n == N - p for n in counts):
            return None
        if min(counts) < 1:
            raise ValueError(f"mask: expected a real patch in each image, got {min(counts)} in one")
    if not strategy.takes_padding:
        raise ValueError(
            "strategy: expected one that takes the mask of a padded batch, such as 'merge' or "
            f"'tome', got {strategy.name!r}; pass images of one size together, without padding"
        )
    keeps = keeps_of(strategy, tower, counts)
    return padding_of(real, lengths, p + max(counts), keeps), max(counts)


def padding_of(
    real: Tensor, lengths: Tensor, N: int, keeps: tuple[tuple[int, ...], ...]
) -> Padding:
    """Return the padding of a batch.

    Args:
        real: (B, N0) bool, False for padding.
        lengths: (B,) the number of real tokens of each image.
        N: the largest of them; N0 in a graph.
        keeps: the patches after each block, of each image; in a graph, of an image without a patch,
            with one, and so on.
    """
    table = torch.tensor(keeps, device=real.device)
    if is_graph():
        table = table[lengths - (N - len(keeps) + 1)]
    order = real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :N]
    mask = torch.arange(N, device=real.device) < lengths[:, None]
    index = (real.cumsum(1) - 1).masked_fill(~real, N)
    most = tuple(max(column) for column in zip(*keeps, strict=True))
    return Padding(order, mask, Slots(index, N, True), table, most)


def is_graph() -> bool:
    """Return whether a graph is captured, which cannot read the values of a mask."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def real_tokens(mask: Tensor, tokens: Tensor) -> Tensor:
    """Return (B, N) bool, False for padding, of the mask that a model passes to its blocks.

    Args:
        mask: (B, N); or (B, 1, 1 or N, N), bool, or added to the attention scores.
        tokens: (B, N, D).

    Raises:
        ValueError: a mask that hides other keys from some real tokens than from others.
    """
    B, N, _ = tokens.shape
    if mask.dim() == 2:
        return mask.bool()
    expected = f"attn_mask: expected one that hides padding alone, (B, 1, 1 or N, N) with B = {B}"
    expected += f" and N = {N}"
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != N:
        raise ValueError(f"{expected}, got {tuple(mask.shape)}")
    seen = (mask if mask.dtype == torch.bool else mask == 0).expand(B, 1, N, N)[:, 0]
    real = seen.diagonal(dim1=1, dim2=2)
    if not is_graph():
        is_alike = (seen == real[:, None]) | ~real[:, :, None]
        if mask.dtype != torch.bool:
            is_alike &= (seen | (mask[:, 0] <= torch.finfo(mask.dtype).min / 2)) | ~real[:, :, None]
        if not is_alike.all():
            raise ValueError(f"{expected}, got another; call the model once for each group")
    return real


def mask_like(mask: Tensor, real: Tensor) -> Tensor:
    """Return the mask of tokens `real` (B, N) in the form of a mask of the model."""
    if mask.dim() == 2:
        return real.to(mask.dtype)
    keys = real[:, None, None]
    if mask.dtype == torch.bool:
        return keys
    lowest = torch.finfo(mask.dtype).min
    return torch.zeros_like(keys, dtype=mask.dtype).masked_fill(~keys, lowest)


def with_masks(args: Args, kwargs: Kwargs, real: Tensor | None) -> tuple[Args, Kwargs]:
    """Return a block's arguments with masks of the tokens `real` (B, N), or without any.

    torch.export cannot read the values of a mask, so transformers models pass one that hides no
    token, where they pass None in a call.
    """

    def changed(mask: Tensor | None) -> Tensor | None:
        return None if mask is None or real is None else mask_like(mask, real)

    named = {name: changed(kwargs[name]) for name in BLOCK_MASKS if name in kwargs}
    return (args[0], *(changed(mask) for mask in args[1:])), kwargs | named
