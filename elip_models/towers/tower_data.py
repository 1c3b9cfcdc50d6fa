"""The data of a tower: the names of its parts, its sizes, its projections, and a query."""

import math
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from elip_kernels import fuse_text

QKV = tuple[Tensor, Tensor, Tensor]


class BlockNames(NamedTuple):
    """The names of a block's parts. Those with dots are of inner modules.

    attn: the module that has the projections. norm1, norm2: the norms before attention and MLP.
    norm: in the model, the norm after the last block.
    out: in `attn`, from its attended values to its output. mlp: in the block, of its MLP sublayer.
    after: in the block, between the output of each sublayer and its residual; see `per_sublayer`.
    qkv: in `attn`, the projections, one joint or three. head_norms: in `attn`, the norms of each
        head's queries and keys.
    dropout: in `attn`, the rate of its weights or a module that has it; the first one counts.
    bias: in the block, the module that computes the bias of its attention from the grid of patches.
    returns_tuple: the block returns a tuple, whose first item is the tokens.
    """

    attn: str
    norm1: str
    norm2: str
    norm: str
    out: tuple[str, ...]
    mlp: tuple[str, ...] = ("mlp",)
    after: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    dropout: tuple[str, ...] = (
        "attention_dropout",
        "dropout",
        "attention.dropout_prob",
        "attention.dropout",
    )
    bias: str = "relative_position_bias"
    returns_tuple: bool = False


def per_sublayer(*names: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names for each sublayer of a block; {} is its number, 1 or 2."""
    return tuple(name.format(1) for name in names), tuple(name.format(2) for name in names)


class TowerSize(NamedTuple):
    """The numbers that FLOPs and token counts depend on.

    image: (H, W) in pixels. hidden: width of the MLP.
    absorbs_keys: an attention row needs no key projection of the tokens.
    averages_keys: the head mean of the keys needs one projection to the width of one head.
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
        """Return the number of tokens that enter block 0."""
        return self.num_patches + self.num_prefix_tokens

    @property
    def patch(self) -> int:
        """Return the side of a square patch in pixels."""
        return math.isqrt(self.image[0] * self.image[1] // self.num_patches)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the rows and columns of patches, if the patches are a grid of one image."""
        height, width = self.image
        rows = max(1, round(math.sqrt(self.num_patches * height / width)))
        return rows, self.num_patches // rows

    def embed_flops(self) -> int:
        """Return the FLOPs of the patch embedding of one image with three channels."""
        height, width = self.image
        return 2 * 3 * height * width * self.width

    def block_flops(self, attention: int, mlp: int, queries: int | None = None) -> int:
        """Return the FLOPs of one block, with these numbers of tokens in attention and MLP.

        `queries` of those in the attention attend to the others; None means all.
        """
        D, n = self.width, attention
        q = n if queries is None else queries
        return 2 * D * (3 * n * D + q * D + 2 * q * n) + 4 * mlp * D * self.hidden

    def row_flops(self, tokens: int) -> int:
        """Return the FLOPs of one CLS attention row."""
        return 2 * tokens * self.width * (self.heads if self.absorbs_keys else self.width + 1)

    def received_flops(self, tokens: int) -> int:
        """Return the FLOPs of the attention that each token receives in one block."""
        return 2 * tokens * self.width * (3 * self.width + 2 * tokens)

    def keys_flops(self, tokens: int) -> int:
        """Return the FLOPs of the head mean of one block's keys."""
        heads = 1 if self.averages_keys else self.heads
        return 2 * tokens * self.width * heads * (self.width // self.heads)


class Projections(NamedTuple):
    """The modules and numbers around a block's query, key and value projections.

    q_norm, k_norm: norms of each head's queries and keys; None without them.
    """

    norm: nn.Module
    num_heads: int
    scale: float
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None


class Affine(NamedTuple):
    """The map x -> x W^T + b."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map to the last dimension of x."""
        return F.linear(x, self.weight, self.bias)


class Query(NamedTuple):
    """The token that scores the others: CLS, fused with a text by Eq. 1 if there is one.

    cls: (B, D) the CLS token; the text if the tower has no CLS token.
    text, fusion, guidance_norm: arguments of `elip_kernels.score_reduce`.
    """

    cls: Tensor
    text: Tensor | None = None
    fusion: float = 1.0
    guidance_norm: Literal["none", "match"] = "none"

    def fused(self) -> Tensor:
        """Return the fused token (B, D), in the dtype of `cls`, without gradient."""
        return self.into(self.cls.unsqueeze(1)).squeeze(1)

    def into(self, tokens: Tensor) -> Tensor:
        """Return `tokens` (B, N, D) with the fused token in place of token 0, without gradient."""
        return fuse_text(tokens, self.text, self.fusion, self.guidance_norm)


def plain_mlp_ratio(width: int, *mlp: nn.Module) -> float:
    """Return the ratio of an MLP in parts; of a gated MLP, that of a plain one of its weights."""
    modules = (m for part in mlp for m in (part, *part.children()))
    linears = (m for m in modules if hasattr(m, "in_features"))
    return sum(m.in_features * m.out_features for m in linears) / (2 * width**2)
