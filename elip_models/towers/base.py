"""An image tower of pre-norm blocks: what an adapter says of a library's model, and what follows.

    block:  x = x + project(attention(norm(x)));  x = mlp(x)        tokens x (B, N, D), CLS first

A tower without CLS has only patches, and a query from outside reads its row from them:

    a = mean_h softmax_n(q_h(norm(t)) . k_h(norm(x_n)))             t (B, D), a (B, N)

An adapter names the parts of a block; the CLS row, the boundary of a stage, and CLS's own way
through a block are worked out of them here, once for all libraries.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, ParamSpec, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elip_kernels
from elip_kernels import BipartiteInfo, ReductionInfo
from elip_models.towers.cls_query import Query
from elip_models.towers.effective_weights import Affine, is_layer_norm
from elip_models.towers.forward_override import in_place_of, own_forward
from elip_models.towers.fsdp import unsharded
from elip_models.towers.scoring_context import scoring_context
from elip_models.towers.size import TowerSize

P = ParamSpec("P")
R = TypeVar("R")

IDENTITY = nn.Identity()
QKV = tuple[Tensor, Tensor, Tensor]
Block = Callable[..., Tensor]


class Projections(NamedTuple):
    """What stands around a block's projections before the softmax.

    q_norm, k_norm: of each head's queries and keys. With them the key projection stays where it is.
    """

    norm: nn.Module
    num_heads: int
    scale: float
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None

    @property
    def can_be_absorbed(self) -> bool:
        """The key and value projections fold into the query: no product over all tokens."""
        return self.q_norm is None and self.k_norm is None and is_layer_norm(self.norm)


class Tower:
    """What the reduction needs of an image model; tokens are (B, N, D) with CLS first.

    An adapter sets these, and defines the methods that raise NotImplementedError here.

    model, blocks: the library's own modules; a block maps tokens to tokens.
    width, depth, num_heads, num_patches, image_size (H, W), mlp_ratio: sizes.
    num_prefix_tokens: tokens that always stay, first: CLS and registers.
    has_cls: token 0 is CLS, which scores; else a text from outside does.
    pools: the model reads all of its patches after the last block, and counts them alike.
    absorbs_keys: a row is read without a key projection of the tokens.
    is_rotary: blocks rotate each token by its place in the image, which then follows the token.
    has_dynamic_size: images of other sizes may go in, each with its own number of patches.
    size_advice: what to do with images of other sizes.
    collector: the module whose call `collects` what blocks give, or None.
    dense_methods: methods of the model that return the tokens of several blocks.
    unsupported_methods: methods of the model that would return nonsense on a reduced one.
    saved_config: the library's own, which it saves with the model, or None.

    `qkv`, `weights`, `project`, `mlp` and what is made of them read block i's parameters where
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
    has_cls: bool = True
    pools: bool = False
    absorbs_keys: bool = True
    is_rotary: bool = False
    has_dynamic_size: bool = False
    size_advice: str = "resize the images"
    collector: nn.Module | None = None
    dense_methods: tuple[str, ...] = ()
    unsupported_methods: tuple[str, ...] = ()
    saved_config: Any = None

    @property
    def num_tokens(self) -> int:
        """Tokens that enter block 0."""
        return self.num_patches + self.num_prefix_tokens

    @property
    def size(self) -> TowerSize:
        """The sizes as plain numbers."""
        return TowerSize(
            self.image_size,
            self.num_patches,
            self.num_prefix_tokens,
            self.width,
            round(self.mlp_ratio * self.width),
            self.num_heads,
            self.depth,
            self.absorbs_keys,
            self.averages_keys,
        )

    @property
    def averages_keys(self) -> bool:
        """The head mean of a block's keys is one projection of the tokens."""
        return self.projections(0).k_norm is None and not self.is_rotary

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

    def collects(self, what: str, kwargs: dict[str, Any]) -> bool:
        """Whether such a call of `collector` returns all "hidden_states", or "attentions"."""
        raise NotImplementedError

    @property
    def entrance(self) -> list[tuple[nn.Module, str]]:
        """The methods that make tokens of images, owner and name, in the order of their calls."""
        raise NotImplementedError

    def image_stats(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and standard deviation of each colour that images are normalised by, or None where
        the library does not say.
        """
        return None

    def refuses_dropping(self) -> str | None:
        """Why no patch may be dropped without merging, in one sentence, or None."""
        return None

    def refuses_resizing(self) -> str | None:
        """Why images of another size cannot go in, in one sentence, or None."""
        return None

    def patchify(self, images: Tensor) -> Tensor:
        """What the entrance makes of images (B, 3, h, w) of any size in whole patches; positions
        are interpolated.
        """
        raise NotImplementedError

    def enter(self, tokens: Tensor) -> Tensor:
        """What stands between the entrance and block 0."""
        raise NotImplementedError

    def at(self, positions: Tensor | None) -> Self:
        """The tower for tokens at these positions of the image; None: all, in order.

        Only a rotary tower tells them apart.
        """
        return self

    def at_no_place(self) -> Self:
        """The tower for one token that comes from outside the image."""
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
        """The parts of block i that make `qkv`, the projections themselves aside."""
        raise NotImplementedError

    def weights(self, i: int) -> list[Affine] | None:
        """Block i's projections of queries, keys and values, each (D, D) as nn.Linear has it; None
        where only calling them, in `qkv`, tells what they do.
        """
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
        shard it would free its parameters, and prefetch for a backward that never comes.
        """
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
            arguments = self.absorbed(i) if mask is None else None
            if arguments is not None:
                return elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
            q, k = self.query_and_keys(i, tokens, cls)
            scale = self.projections(i).scale
            return elip_kernels.cls_attention(q, k.to(q.dtype), scale=scale, mask=mask)

    def absorbed(self, i: int, *, values: bool = False) -> dict[str, Any] | None:
        """The arguments of `cls_attention_from_tokens`, or of `cls_attention_output` with values;
        None where block i has no such form.
        """
        parts = self.projections(i)
        weights = self.weights(i) if self.absorbs_keys and parts.can_be_absorbed else None
        if weights is None:
            return None
        q, k, v = weights
        arguments = {
            "norm_weight": parts.norm.weight,
            "norm_bias": parts.norm.bias,
            "eps": parts.norm.eps,
            "q_weight": q.weight,
            "q_bias": q.bias,
            "k_weight": k.weight,
            "num_heads": parts.num_heads,
            "scale": parts.scale,
        }
        return arguments | {"v_weight": v.weight, "v_bias": v.bias} if values else arguments

    def query_and_keys(self, i: int, tokens: Tensor, cls: Tensor) -> tuple[Tensor, Tensor]:
        """Block i's query (B, H, d) of `cls`, and the keys (B, H, N, d) of `cls_attention`."""
        parts, weights = self.projections(i), self.weights(i)
        x = with_cls(tokens, cls) if self.has_cls else tokens
        if weights is None:
            q, k, _ = self.qkv(i, x)
            q = q if self.has_cls else self.at_no_place().qkv(i, cls[:, None])[0]
            return q[:, :, 0], k
        x = parts.norm(x)
        q = x[:, :1] if self.has_cls else parts.norm(cls[:, None])
        each = (project(y) for project, y in zip(weights, (q, x), strict=False))
        q, k = (y.unflatten(2, (parts.num_heads, -1)).transpose(1, 2) for y in each)
        q, k = (parts.q_norm or IDENTITY)(q)[:, :, 0], (parts.k_norm or IDENTITY)(k)
        return q, self.turned(i, k)

    def score_reduce(
        self,
        i: int,
        tokens: Tensor,
        scored: Tensor,
        query: Query,
        *,
        keep: int,
        merge: bool,
        row: Tensor | None = None,
    ) -> tuple[Tensor, ReductionInfo, Tensor]:
        """Block i's CLS row over `scored` selects among `tokens` -> reduced tokens, what was kept,
        the row.

        scored: (B, N, D), `tokens` themselves, or as a dry run left them.
        row: (B, N), where it is known already, and nothing is to be scored.
        """
        with self.unsharded(i, scored, query.cls) as (read, cls):
            arguments = self.absorbed(i) if self.num_prefix_tokens == 1 else None
            if arguments is not None:
                arguments |= query._replace(cls=cls)._asdict()
                arguments |= {"scored": None if read is tokens else read, "row": row}
                return elip_kernels.score_reduce(
                    tokens, keep=keep, merge=merge, return_info=True, **arguments
                )
        if row is None:
            with scoring_context(self.model, tokens):
                row = self.cls_attention(i, scored, query.fused())
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
            arguments = self.absorbed(i, values=True)
            if arguments is not None:
                attended = elip_kernels.cls_attention_output(tokens, cls, **arguments)
            else:
                q, k, v = self.qkv(i, with_cls(tokens, cls))
                scale = self.projections(i).scale
                row = F.scaled_dot_product_attention(q[:, :, :1], k, v, scale=scale)
                attended = row.flatten(1)
            cls = cls[:, None] + self.project(i, attended[:, None])
            return self.mlp(i, cls)[:, 0]


def with_cls(tokens: Tensor, cls: Tensor) -> Tensor:
    """`tokens` (B, N, D) with `cls` (B, D) in place of token 0."""
    return torch.cat([cls[:, None], tokens[:, 1:]], dim=1)


def optional(module: nn.Module, name: str) -> nn.Module:
    """A part that only some models have; the identity for the others."""
    return getattr(module, name, IDENTITY)
