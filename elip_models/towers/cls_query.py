"""What asks for tokens."""

from typing import Literal, NamedTuple

from torch import Tensor

from elip_kernels.ops.fuse_text import fuse_text


class Query(NamedTuple):
    """The CLS token (B, D), fused with a text by Eq. 1 where there is one.

    cls: of a tower without CLS, the text.
    text, fusion, guidance_norm: as `elip_kernels.score_reduce` takes them.
    """

    cls: Tensor
    text: Tensor | None = None
    fusion: float = 1.0
    guidance_norm: Literal["none", "match"] = "none"

    def fused(self) -> Tensor:
        """(B, D), in the dtype of `cls`, without gradient."""
        return self.into(self.cls.unsqueeze(1)).squeeze(1)

    def into(self, tokens: Tensor) -> Tensor:
        """`tokens` (B, N, D), of which `cls` is the first, with the fused one in its place; without
        gradient.
        """
        return fuse_text(tokens, self.text, self.fusion, self.guidance_norm)
