"""A smaller image, whose most similar tokens are merged.

    image   leaves sqrt(k) of the tokens, of `keep` = k
    merges  leave sqrt(k) of those, spread over the blocks as `TokenMerging` does

Either alone keeps less recall at half of the FLOPs (docs/results.md).
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

from torch import Tensor

from elip_models.strategies.flops import TokenCounts
from elip_models.strategies.resize import resized_images, resized_size
from elip_models.strategies.schedule import Stage
from elip_models.strategies.strategy import Strategy, least_share, refuse_symbols
from elip_models.strategies.token_merging import TokenMerging
from elip_models.towers import Tower, TowerSize
from elip_models.validation import PositiveInt


@dataclass(frozen=True)
class ResizeMerge(TokenMerging):
    """Resize the image, and merge the most similar tokens in every block.

    Attributes:
        size: the height in pixels, see `ImageResize`. None: the height that `keep` requires; the
            image's own if `r` is given.
        r: see `ToMe`, of the patches of the smaller image.
        proportional, compare, keep_norm, class_token_only, position, decrease, reach: as of
            `ToMe`.
    """

    name: ClassVar[str] = "resize_merge"
    summary: ClassVar[str] = "merges the most similar tokens of a smaller image"
    place: ClassVar[str] = "the image, every block"
    changes_embedding: ClassVar[bool] = True

    size: PositiveInt | None = None

    def why_unsupported(self, tower: Tower) -> str | None:
        return tower.refuses_resizing() or super().why_unsupported(tower)

    def resized(self, size: TowerSize) -> TowerSize:
        return resized_size(size, self._height(size) or size.image[0])

    def resize(self, tower: Tower, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) resized to (B, 3, h, w)."""
        refuse_symbols(images.shape[2:], self.name)
        height, image = self._height(tower.size), tuple(images.shape[2:])
        if height is None and image == tower.size.image:
            return images
        return resized_images(images, height or image[0], tower.size.patch)

    def embed_flops(self, size: TowerSize) -> int:
        return self.resized(size).embed_flops()

    def stages(self, size: TowerSize) -> tuple[Stage, ...]:
        whole = self.with_rate(size)
        return super(ResizeMerge, whole).stages(whole.resized(size))

    def token_counts(self, size: TowerSize) -> tuple[TokenCounts, ...]:
        """Return the tokens in each block, beginning with those of the resized image."""
        whole = self.with_rate(size)
        return super(ResizeMerge, whole).token_counts(whole.resized(size))

    def at_strength(self, size: TowerSize, strength: float) -> Strategy:
        """Return the strategy with a smaller image, if its size is open, and a share of merges."""
        if self.size is not None:
            return super().at_strength(self.resized(size), strength)
        kept = 1 - strength * (1 - least_share(size))
        rows = size.image[0] // size.patch
        least = ceil(rows * kept**0.5)  # rows of an image whose tokens need not merge
        height = size.patch * max(least, round(rows * kept**0.25))
        patches = resized_size(size, height).num_patches
        merged = 2 * max(0.0, patches - kept * size.num_patches)  # half of them, on average
        per_block = round(merged) / (size.depth * patches)
        return replace(self, size=height, r=min(0.5, per_block))

    def _height(self, size: TowerSize) -> int | None:
        """Return the height of the smaller image, or None for the image's own."""
        return self.with_rate(size).size if self.size is None else self.size
