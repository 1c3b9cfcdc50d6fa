"""Resize the image, and run the dense tower on fewer patches."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.strategies.flops import at_flops
from elip_models.strategies.schedule import Stage
from elip_models.strategies.strategy import Strategy, TokenCounts, refuse_symbols, tower_of
from elip_models.towers import Tower, TowerSize
from elip_models.validation import PositiveInt, check_fields


@dataclass(frozen=True)
class ImageResize(Strategy):
    """Resize the image and interpolate the position embeddings: the simplest baseline.

    Attributes:
        size: the height in pixels, a multiple of the patch size; the width keeps its proportion.
            None: the height that `keep` requires.
    """

    name: ClassVar[str] = "resize"
    summary: ClassVar[str] = "control: a smaller image"
    place: ClassVar[str] = "the image"
    keep_field: ClassVar[str | None] = "size"
    changes_embedding: ClassVar[bool] = True

    size: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def why_unsupported(self, tower: Tower) -> str | None:
        """Return why the tower cannot read a smaller image."""
        return tower.refuses_resizing()

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        """Return no stage: the blocks run unchanged."""
        resized_pixels(size.image, self.with_rate(size).size, size.patch)
        return ()

    def resized(self, size: TowerSize) -> TowerSize:
        return resized_size(size, self.with_rate(size).size)

    def token_counts(self, size: TowerSize) -> tuple[TokenCounts, ...]:
        """Return the tokens of the resized image in every block."""
        tokens = self.resized(size).num_tokens
        return (TokenCounts(tokens, tokens),) * size.depth

    def embed_flops(self, size: TowerSize) -> int:
        return self.resized(size).embed_flops()

    def resize(self, tower: Tower, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) resized to (B, 3, h, w)."""
        refuse_symbols(images.shape[2:], self.name)
        return resized_images(images, self.with_rate(tower.size).size, tower.size.patch)

    def at_strength(self, size: TowerSize, strength: float) -> Strategy:
        """Return the strategy with the size of that strength, in whole patches."""
        rows = size.image[0] // size.patch
        return replace(self, size=size.patch * (rows - round(strength * (rows - 1))))

    def at_flops(
        self, model: nn.Module | Tower, ratio: float, *, training: bool = True
    ) -> "ImageResize":
        """Return the size whose FLOPs are nearest to `ratio` of dense.

        Whole patches seldom meet the ratio exactly, so no tolerance applies.
        """
        size = tower_of(model).size
        return at_flops(self, size, ratio, training=training, exactly=False)


def resized_pixels(image: tuple[int, int], height: int, patch: int) -> tuple[int, int]:
    """Return the size (h, w) of an image (H, W) at another height, in whole patches."""
    if height % patch or height > image[0]:
        raise ValueError(
            f"size: expected a multiple of the patch, {patch}, up to {image[0]}, the image's "
            f"height, got {height}"
        )
    return height, max(patch, round(height * image[1] / image[0] / patch) * patch)


def resized_size(size: TowerSize, height: int) -> TowerSize:
    """Return the size of the tower that reads images of this height."""
    if height == size.image[0]:
        return size
    image = resized_pixels(size.image, height, size.patch)
    patches = (image[0] // size.patch) * (image[1] // size.patch)
    return size._replace(image=image, num_patches=patches)


def resized_images(images: Tensor, height: int, patch: int) -> Tensor:
    """Return images (B, 3, H, W) of this height, in whole patches."""
    pixels = resized_pixels(tuple(map(int, images.shape[2:])), height, patch)
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(wide, pixels, mode="bicubic", antialias=True).to(images.dtype)
