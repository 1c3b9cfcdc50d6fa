"""An image tower of pre-norm blocks: what an adapter says of a library's model, and what follows.

    block:  x = x + project(attention(norm(x)));  x = mlp(x)        tokens x (B, N, D), CLS first

A tower without CLS has only patches, and a query from outside reads its row from them:

    a = mean_h softmax_n(q_h(norm(t)) . k_h(norm(x_n)))             t (B, D), a (B, N)

An adapter names the parts of a block; the CLS row, the boundary of a stage, and CLS's own way
through a block are worked out of them here, once for all libraries.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elip_kernels
from elip_kernels import BipartiteInfo, ReductionInfo
from elip_models.towers.apart import apart
from elip_models.towers.fsdp import as_forward, unsharded
from elip_models.towers.size import Size

P = ParamSpec("P")
R = TypeVar("R")

IDENTITY = nn.Identity()
QKV = tuple[Tensor, Tensor, Tensor]
Block = Callable[..., Tensor]


class Projections(NamedTuple):
    """What a block's attention reads before the softmax; weights are (D, D), as nn.Linear has them.

    q_norm, k_norm: of each head's queries and keys. With them the key projection stays where it is.
    """

    norm: nn.LayerNorm
    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    num_heads: int
    scale: float
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None

    @property
    def can_be_absorbed(self) -> bool:
        """The key and value projections fold into the query: no product over all tokens."""
        return self.q_norm is None and self.k_norm is None

    def absorbed(self) -> dict[str, Tensor | float | int | None]:
        """The arguments of `cls_attention_from_tokens`."""
        return {
            "norm_weight": self.norm.weight,
            "norm_bias": self.norm.bias,
            "eps": self.norm.eps,
            "q_weight": self.q_weight,
            "q_bias": self.q_bias,
            "k_weight": self.k_weight,
            "num_heads": self.num_heads,
            "scale": self.scale,
        }


class Tower:
    """What the reduction needs of an image model; tokens are (B, N, D) with CLS first.

    An adapter sets these, and defines the methods that raise NotImplementedError here.

    model, blocks: the library's own modules; a block maps tokens to tokens.
    width, depth, num_heads, num_patches, image_size (H, W), mlp_ratio: sizes.
    num_prefix_tokens: tokens that always stay, first; CLS is number 0. None: a tower without CLS.
    absorbs_keys: a row is read without a key projection of the tokens.
    is_rotary: blocks rotate each token by its place in the image, which then follows the token.
    unsupported_methods: methods of the model that would return nonsense on a reduced one.

    `qkv`, `projections`, `project`, `mlp` and what is made of them read block i's parameters where
    they are, so a caller outside block i's forward calls them inside `unsharded(i)`.
    """

    model: nn.Module
    blocks: nn.Sequential | nn.ModuleList
    width: int
    depth: int
    num_heads: int
    num_patches: int
    image_size: tuple[int, int]
    mlp_ratio: float
    num_prefix_tokens: int = 1
    absorbs_keys: bool = True
    is_rotary: bool = False
    unsupported_methods: tuple[str, ...] = ()

    @property
    def has_cls(self) -> bool:
        """Token 0 is CLS, which scores; else a text from outside does."""
        return self.num_prefix_tokens > 0

    @property
    def num_tokens(self) -> int:
        """Tokens that enter block 0."""
        return self.num_patches + self.num_prefix_tokens

    @property
    def size(self) -> Size:
        """The sizes as plain numbers."""
        return Size(
            self.image_size,
            self.num_patches,
            self.num_prefix_tokens,
            self.width,
            round(self.mlp_ratio * self.width),
            self.num_heads,
            self.depth,
            self.absorbs_keys,
        )

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        """The model is one of those that the adapter is to judge, where a library has several."""
        return True

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Why the model cannot be a tower, in one sentence, or None."""
        raise NotImplementedError

    @property
    def checkpointing(self) -> bool:
        """The model asks for activation checkpointing of its blocks, and does it in its forward."""
        raise NotImplementedError

    @property
    def entrance(self) -> list[tuple[nn.Module, str]]:
        """The methods that make tokens of images, owner and name, in the order of their calls."""
        raise NotImplementedError

    def image_stats(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and standard deviation of each colour that images are normalised by, or None where
        the library does not say."""
        return None

    def refuses_resizing(self) -> str | None:
        """Why images of another size cannot go in, in one sentence, or None."""
        return None

    def patchify(self, images: Tensor) -> Tensor:
        """What the entrance makes of images (B, 3, h, w) of any size in whole patches; positions
        are interpolated."""
        raise NotImplementedError

    def enter(self, tokens: Tensor) -> Tensor:
        """What stands between the entrance and block 0."""
        raise NotImplementedError

    def at(self, positions: Tensor | None) -> Self:
        """The tower for tokens that stand at these places of the image; None: all, in order.

        Only a rotary tower tells them apart.
        """
        return self

    def positions_after(self, reduction: ReductionInfo | BipartiteInfo) -> Tensor | None:
        """Where the tokens stand that a reduction leaves, or None where nothing reads it."""
        return None

    def moved(self, kwargs: dict[str, Any], positions: Tensor) -> dict[str, Any]:
        """What the model calls a block by besides all tokens, for those at `positions`."""
        return kwargs

    def turned(self, i: int, heads: Tensor) -> Tensor:
        """Block i's queries or keys (B, H, N, d), each rotated by its token's place."""
        return heads

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> tokens: everything before block 0."""
        raise NotImplementedError

    def qkv(self, i: int, tokens: Tensor) -> QKV:
        """Block i's queries, keys and values (B, H, N, d) of tokens before its norm."""
        raise NotImplementedError

    def projections(self, i: int) -> Projections:
        """The parts of block i that make `qkv`."""
        raise NotImplementedError

    def attention_dropout(self, i: int) -> float:
        """The rate that block i drops attention weights with, now."""
        raise NotImplementedError

    def project(self, i: int, attended: Tensor) -> Tensor:
        """What block i makes of its attention's output (B, N, D) and adds to the tokens."""
        raise NotImplementedError

    def mlp(self, i: int, tokens: Tensor) -> Tensor:
        """Block i's MLP half, residual included."""
        raise NotImplementedError

    def is_plain(self, i: int) -> bool:
        """Block i runs its own parts in eval mode and nothing else: `cls_block` is exact for it."""
        raise NotImplementedError

    def finish(self, tokens: Tensor) -> Tensor:
        """The final norm, before pooling."""
        raise NotImplementedError

    def block(self, i: int, tokens: Tensor) -> Tensor:
        """Block i, whole, by its own forward."""
        return self.call(i, self.blocks[i], tokens)

    def call(self, i: int, block: Block, tokens: Tensor) -> Tensor:
        """Block i, or its forward alone, as the library's model calls it."""
        return block(tokens)

    def in_block(
        self, i: int, step: Callable[[Tensor], tuple[Tensor, R]], tokens: Tensor
    ) -> tuple[Tensor, R]:
        """`step(tokens) -> (tokens, more)` in place of block i's forward, with gradient."""
        return in_place_of(self.blocks[i], step, tokens)

    def unsharded(self, i: int, *tensors: Tensor) -> AbstractContextManager[tuple[Tensor, ...]]:
        """Inside, block i's parameters are whole, also where it is sharded; yields `tensors`."""
        return unsharded(self.blocks[i], *tensors)

    def dry_block(self, i: int, tokens: Tensor) -> Tensor:
        """Block i, whole, without gradient, by its own forward: no hook sees the call. Those that
        shard it would free its parameters, and prefetch for a backward that never comes."""
        with self.unsharded(i, tokens) as (tokens,):
            return self.call(i, own_forward(self.blocks[i]), tokens)

    def attend(
        self, i: int, tokens: Tensor, bias: Tensor | None = None, *, qkv: QKV | None = None
    ) -> Tensor:
        """Block i's attention half, residual included.

        bias is added to the scores; qkv, where the caller has made them, are not made again.
        """
        q, k, v = self.qkv(i, tokens) if qkv is None else qkv
        dropout, scale = self.attention_dropout(i), self.projections(i).scale
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale
        )
        return tokens + self.project(i, attended.transpose(1, 2).flatten(2))

    def attention_map(self, i: int, tokens: Tensor, *, qkv: QKV | None = None) -> Tensor:
        """Block i's whole softmax map (B, H, N, N), as the official code computes it."""
        q, k, _ = self.qkv(i, tokens) if qkv is None else qkv
        return torch.matmul(q * self.projections(i).scale, k.mT).softmax(-1)

    def cls_attention(
        self, i: int, tokens: Tensor, cls: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """Block i's CLS row (B, N), head mean, with `cls` (B, D) in place of token 0.

        Of a tower without CLS, `cls` is the query alone, and the row one of the N tokens.
        mask: (B, N) bool, True where a token is real.
        """
        with self.unsharded(i, tokens, cls) as (tokens, cls):
            parts = self.projections(i)
            if self.absorbs_keys and parts.can_be_absorbed and mask is None:
                return elip_kernels.cls_attention_from_tokens(tokens, cls, **parts.absorbed())
            x = parts.norm(with_cls(tokens, cls) if self.has_cls else tokens)
            q = x[:, :1] if self.has_cls else parts.norm(cls[:, None])
            q = F.linear(q, parts.q_weight, parts.q_bias)
            k = F.linear(x, parts.k_weight, parts.k_bias)
            q, k = (y.unflatten(2, (parts.num_heads, -1)).transpose(1, 2) for y in (q, k))
            q, k = (parts.q_norm or IDENTITY)(q)[:, :, 0], (parts.k_norm or IDENTITY)(k)
            k = self.turned(i, k)
            return elip_kernels.cls_attention(q, k.to(q.dtype), scale=parts.scale, mask=mask)

    def score_reduce(
        self,
        i: int,
        tokens: Tensor,
        cls: Tensor,
        keep: int,
        *,
        merge: bool,
        row: Tensor | None = None,
    ) -> tuple[Tensor, ReductionInfo, Tensor]:
        """Block i's CLS row selects among `tokens` -> reduced tokens, what was kept, the row.

        row: (B, N), where it is known already, and nothing is to be scored.
        """
        with self.unsharded(i, tokens, cls) as (tokens, cls):
            parts = self.projections(i)
            absorbs = self.absorbs_keys and parts.can_be_absorbed
            if absorbs and self.num_prefix_tokens == 1:
                return elip_kernels.score_reduce(
                    tokens, cls, keep, merge=merge, row=row, return_info=True, **parts.absorbed()
                )
            if row is None:
                with apart(self.model, tokens):
                    row = self.cls_attention(i, tokens, cls)
        return *self.reduce(tokens, row, keep, merge=merge), row

    def reduce(
        self, tokens: Tensor, row: Tensor, keep: int, *, merge: bool
    ) -> tuple[Tensor, ReductionInfo]:
        """`elip_kernels.reduce` by a row (B, N) of scores, the prefix tokens' aside."""
        return elip_kernels.reduce(
            tokens,
            row,
            keep,
            merge=merge,
            num_prefix_tokens=self.num_prefix_tokens,
            return_info=True,
        )

    def cls_block(self, i: int, tokens: Tensor, cls: Tensor) -> Tensor:
        """`cls` (B, D) through block i alone, attending to `tokens` -> (B, D)."""
        with self.unsharded(i, tokens, cls) as (tokens, cls):
            parts = self.projections(i)
            if self.absorbs_keys and parts.can_be_absorbed:
                arguments = parts.absorbed() | {"v_weight": parts.v_weight, "v_bias": parts.v_bias}
                attended = elip_kernels.cls_attend_from_tokens(tokens, cls, **arguments)
            else:
                q, k, v = self.qkv(i, with_cls(tokens, cls))
                row = F.scaled_dot_product_attention(q[:, :, :1], k, v, scale=parts.scale)
                attended = row.flatten(1)
            cls = cls[:, None] + self.project(i, attended[:, None])
            return self.mlp(i, cls)[:, 0]


def interpolated(positions: Tensor, grid: tuple[int, int], to: tuple[int, int], p: int) -> Tensor:
    """Position embeddings (p + rows * columns, D) of a grid -> of another; those of p prefix tokens
    stay."""
    if grid == to:
        return positions
    at_least_fp32 = torch.promote_types(positions.dtype, torch.float32)
    table = positions[p:].to(at_least_fp32).unflatten(0, grid).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=to, mode="bicubic", antialias=True, align_corners=False)
    table = table[0].flatten(1).T.to(positions.dtype)
    return torch.cat([positions[:p], table])


def with_cls(tokens: Tensor, cls: Tensor) -> Tensor:
    """`tokens` (B, N, D) with `cls` (B, D) in place of token 0."""
    return torch.cat([cls[:, None], tokens[:, 1:]], dim=1)


def own_forward(block: nn.Module) -> Block:
    """What the block runs without a stand-in of ours: its class's forward, or another's in place
    of that."""
    forward = vars(block).get("forward")
    if forward is None:
        return partial(type(block).forward, block)
    return getattr(forward, "own_forward", forward)


def in_forward(
    run: Callable[Concatenate["Tower", Tensor, P], tuple[Tensor, R]],
) -> Callable[Concatenate["Tower", Tensor, P], tuple[Tensor, R]]:
    """`run(tower, images, ..) -> (tokens, more)` in place of the forward of the tower's model."""

    @wraps(run)
    def run_in_forward(
        tower: Tower, images: Tensor, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Tensor, R]:
        return in_place_of(tower.model, lambda x: run(tower, x, *args, **kwargs), images)

    return run_in_forward


def in_place_of(
    module: nn.Module, step: Callable[[Tensor], tuple[Tensor, R]], tokens: Tensor
) -> tuple[Tensor, R]:
    """`step(tokens) -> (tokens, more)` in place of the module's forward, with gradient."""
    more = []

    def forward(tokens: Tensor) -> Tensor:
        tokens, rest = step(tokens)
        more.append(rest)
        return tokens

    return as_forward(module, forward, tokens), more[0]


def optional(module: nn.Module, name: str) -> nn.Module:
    """A part that only some models have; the identity for the others."""
    return getattr(module, name, IDENTITY)


def is_observed(module: nn.Module) -> bool:
    """A hook or a replaced forward sees the module's calls, or it is in training mode."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or module.training or "forward" in vars(module)
