"""Image towers seen as embed, blocks, attend, mlp, cls_attention, finish.

A tower reads a model's own modules and adds nothing to it. `as_tower` finds the one that fits.
"""

from typing import Protocol

from torch import Tensor, nn

from elip_kernels import ReductionInfo


class Tower(Protocol):
    """What the reduction needs of an image model; tokens are (B, N, D) with CLS first."""

    model: nn.Module
    blocks: nn.Sequential
    width: int
    depth: int
    num_patches: int
    image_size: tuple[int, int]
    mlp_ratio: float
    side_doors: tuple[str, ...]

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> tokens: everything before block 0."""

    def attend(self, i: int, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        """Block i's attention half, residual included."""

    def mlp(self, i: int, tokens: Tensor) -> Tensor:
        """Block i's MLP half, residual included."""

    def attention_map(self, i: int, tokens: Tensor) -> Tensor:
        """Block i's whole softmax map (B, H, N, N), as the official code computes it."""

    def cls_attention(self, i: int, tokens: Tensor, cls: Tensor) -> Tensor:
        """Block i's CLS row (B, N), head mean, with `cls` (B, D) in place of token 0."""

    def score_reduce(
        self, i: int, tokens: Tensor, cls: Tensor, keep: int, *, merge: bool
    ) -> tuple[Tensor, ReductionInfo, Tensor]:
        """Block i's CLS row selects among `tokens` -> reduced tokens, what was kept, the row."""

    def cls_block(self, i: int, tokens: Tensor, cls: Tensor) -> Tensor:
        """`cls` (B, D) through block i alone, attending to `tokens` -> (B, D)."""

    def is_plain(self, i: int) -> bool:
        """Block i runs its own parts in eval mode and nothing else: `cls_block` is exact for it."""

    def finish(self, tokens: Tensor) -> Tensor:
        """The final norm, before pooling."""

    @property
    def checkpointing(self) -> bool:
        """The model asks for activation checkpointing."""


def as_tower(model: nn.Module) -> Tower:
    """The tower of an image model.

    Raises:
        TypeError: not a model that a tower reads, or a variant of one that it does not: why.
        ImportError: timm is missing.
    """
    try:
        from elip_models.towers.timm import TimmTower
    except ModuleNotFoundError as error:
        raise ImportError(
            f"elip_models needs {error.name}: pip install 'elip-kernels[models]'"
        ) from error
    reason = TimmTower.refuses(model)
    if reason is not None:
        raise TypeError(
            "model: expected a timm VisionTransformer that can be reduced, got "
            f"{type(model).__name__}: {reason}"
        )
    return TimmTower(model)
