"""The sizes of a tower, and the FLOPs that follow."""

import math
from typing import NamedTuple


class TowerSize(NamedTuple):
    """What FLOPs and token counts depend on; image is (H, W), hidden the MLP's width.

    absorbs_keys: a row needs no key projection of the tokens.
    averages_keys: the head mean of the keys needs a projection to one head's width alone.
    """

    image: tuple[int, int]
    num_patches: int
    num_prefix_tokens: int
    width: int
    hidden: int
    heads: int
    depth: int
    absorbs_keys: bool = True
    averages_keys: bool = True

    @property
    def num_tokens(self) -> int:
        """Tokens that enter block 0."""
        return self.num_patches + self.num_prefix_tokens

    @property
    def patch(self) -> int:
        """Pixels of a square patch's side."""
        return math.isqrt(self.image[0] * self.image[1] // self.num_patches)

    def embed_flops(self) -> int:
        """Of the patch embedding of one image: every pixel of three channels meets its weights."""
        height, width = self.image
        return 2 * 3 * height * width * self.width

    def block_flops(self, attention: int, mlp: int) -> int:
        """Of one block's forward, for `attention` tokens in its first half, `mlp` in the other."""
        D = self.width
        return 4 * attention * D * (2 * D + attention) + 4 * mlp * D * self.hidden

    def row_flops(self, tokens: int) -> int:
        """Of one CLS row."""
        return 2 * tokens * self.width * (self.heads if self.absorbs_keys else self.width + 1)

    def received_flops(self, tokens: int) -> int:
        """Of what each token receives in one block: its projections, and scores made twice."""
        return 2 * tokens * self.width * (3 * self.width + 2 * tokens)

    def keys_flops(self, tokens: int) -> int:
        """Of the head mean of one block's keys."""
        heads = 1 if self.averages_keys else self.heads
        return 2 * tokens * self.width * heads * (self.width // self.heads)
