"""The parts of an image model that an adapter defines, and the sizes that FLOPs follow from.

    x = x + residual1(out(attention(norm1(x))));  x = x + residual2(mlp(norm2(x)))

All blocks compute this function; the names of its parts differ. A `BlockNames` has these names;
a part is a module, or a parameter that scales each channel. `run` calls parts in order.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_kernels import fuse_text
from elip_models.towers.module_references import ModuleReference
from elip_models.towers.wrapped_modules import is_plain

NO_POSITION = -1
"""Of a token that is made of all dropped ones."""
QKV = tuple[Tensor, Tensor, Tensor]
Block = Callable[..., Tensor]


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


class TowerParts:
    """The attributes and methods of `Tower` that an adapter sets or overrides.

    Methods that raise NotImplementedError have no default. Tokens are (B, N, D), prefix tokens
    first. `qkv`, `weights`, `project` and `mlp` read the parameters of block i, so a caller outside
    the block's forward calls them inside `unsharded(i)`.

    model, blocks: the library's own modules; a block maps tokens to tokens.
    names: the names of the parts of a block.
    width, depth, num_heads, num_patches, image_size (H, W), mlp_ratio: sizes.
    scale: factor of the attention scores.
    num_frames: the frames of a clip that a video model reads. num_steps: the tubelets over time of
        one place; P = num_steps x rows x columns. Both are 1 for images.
    num_prefix_tokens: the number of tokens before the patches (CLS, registers); they always stay.
    has_cls: token 0 is CLS, whose attention scores; otherwise a text scores.
    pools: the model averages or attends to all patches after the last block.
    absorbs_keys: a row is computed without a key projection of the tokens.
    is_rotary: blocks rotate queries and keys by the position of their patch.
    adds_bias: blocks add a bias to their attention for each pair of positions.
    positions: (B, N-p) the patch of each token, `NO_POSITION` for one without; None if the tokens
        are all patches in order. Only a tower that `has_positions` sets them.
    returns_tuple: a block returns a tuple, whose first item is the tokens.
    takes_padding: the model passes its blocks a mask, if images of a batch have other sizes.
    has_dynamic_size: the model takes images of other sizes, with other numbers of patches.
    size_advice: the remedy in an error about the image size.
    dense_methods: methods of the model that return the tokens of several blocks.
    unsupported_methods: methods of the model that would return wrong results on a reduced model.
    saved_config: the configuration that the library saves with the model, or None.
    is_part: the model has other parts than the tower and its head, such as a language model.
    whole_output: how to get all tokens from a model whose output is the tokens of the last block;
        None if its output is another.
    """

    model = ModuleReference()
    blocks = ModuleReference()
    names: BlockNames
    width: int
    depth: int
    num_heads: int
    num_patches: int
    image_size: tuple[int, int]
    mlp_ratio: float
    scale: float
    num_frames: int = 1
    num_steps: int = 1
    num_prefix_tokens: int = 1
    has_cls: bool = True
    pools: bool = False
    absorbs_keys: bool = True
    is_rotary: bool = False
    adds_bias: bool = False
    positions: Tensor | None = None
    returns_tuple: bool = False
    takes_padding: bool = False
    has_dynamic_size: bool = False
    size_advice: str = "resize the images"
    dense_methods: tuple[str, ...] = ()
    unsupported_methods: tuple[str, ...] = ()
    saved_config: Any = None
    is_part: bool = False
    whole_output: str | None = None

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        """Return whether this adapter handles the model, if its library has several adapters."""
        return True

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Return why the model cannot be a tower, in one sentence, or None if it can."""
        raise NotImplementedError

    @classmethod
    def refuses_blocks(cls, blocks: Iterable[nn.Module]) -> str | None:
        """Return why one of the blocks cannot be read, in one sentence, or None if all can."""
        reasons = (cls.refuses_block(block) for block in blocks)
        return next((reason for reason in reasons if reason is not None), None)

    @classmethod
    def refuses_block(cls, block: nn.Module) -> str | None:
        """Return why a block cannot be read, in one sentence, or None if it can."""
        return None

    @classmethod
    def refuses_attention(cls, attn: nn.Module) -> str | None:
        """Return why an attention cannot be read, in one sentence, or None if it can."""
        raise NotImplementedError

    def own_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules of the model around the tower, without those of models inside it."""
        return list(model.modules())

    @property
    def checkpointing(self) -> bool:
        """Return whether the model's forward, not its blocks, checkpoints their activations."""
        return False

    @property
    def trunk(self) -> nn.Module:
        """Return the module that has the blocks: the model, or a part of it."""
        return self.model

    @property
    def collector(self) -> nn.Module | None:
        """Return the module whose call `collects` hidden states or attentions, or None."""
        return None

    def collects(self, what: str, kwargs: dict[str, Any]) -> bool:
        """Return whether this call of `collector` returns all "hidden_states" or "attentions"."""
        raise NotImplementedError

    @property
    def embed_methods(self) -> list[tuple[nn.Module, str]]:
        """Return the owners and names of the methods that embed images, in call order."""
        raise NotImplementedError

    def image_stats(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Return the mean and standard deviation that normalise images, or None if unknown."""
        return None

    def refuses_dropping(self) -> str | None:
        """Return why no patch may be dropped without merging, in one sentence, or None."""
        return None

    def refuses_resizing(self) -> str | None:
        """Return why the image size cannot change, in one sentence, or None if it can."""
        return None

    def patchify(self, images: Tensor) -> Tensor:
        """Return what `embed_methods` makes of images (B, 3, h, w), with interpolated positions."""
        raise NotImplementedError

    def enter(self, tokens: Tensor) -> Tensor:
        """Run the modules between `embed_methods` and block 0; by default there are none."""
        return tokens

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens before block 0 of images (B, 3, H, W)."""
        raise NotImplementedError

    def rotated(self, i: int, heads: Tensor) -> Tensor:
        """Rotate block i's queries or keys (B, H, N, d) by the position of each token."""
        return heads

    def qkv(self, i: int, tokens: Tensor) -> QKV:
        """Return block i's queries, keys and values (B, H, N, d) of tokens before its norm."""
        attn, heads = self._attention(i), self.num_heads
        projected = self.projected(attn, getattr(self.blocks[i], self.names.norm1)(tokens))
        if isinstance(projected, Tensor):
            q, k, v = projected.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        else:
            q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in projected)
        q_norm, k_norm = self._head_norms(attn)
        return self.rotated(i, normed(q_norm, q)), self.rotated(i, normed(k_norm, k)), v

    def projected(self, attn: nn.Module, x: Tensor) -> Tensor | list[Tensor]:
        """Return queries, keys and values (B, N, D) of `x`, after the norm; joint if one layer."""
        layers = self._layers(attn)
        return layers[0](x) if len(layers) == 1 else [layer(x) for layer in layers]

    def attention_dropout(self, i: int) -> float:
        """Return the current dropout rate of block i's attention weights."""
        attn = self._attention(i)
        if not attn.training:
            return 0.0
        rates = (part(attn, name) for name in self.names.dropout)
        rate = next((rate for rate in rates if rate is not None), 0.0)
        return rate.p if isinstance(rate, nn.Dropout) else rate

    def project(self, i: int, attended: Tensor) -> Tensor:
        """Return what block i adds to the tokens, from its attention's output (B, N, D)."""
        out = run(self._attention(i), self.names.out, attended)
        return run(self.blocks[i], self.names.after[0], out)

    def mlp(self, i: int, tokens: Tensor) -> Tensor:
        """Run block i's MLP sublayer, residual included."""
        names = self.names
        return tokens + run(self.blocks[i], (names.norm2, *names.mlp, *names.after[1]), tokens)

    def is_plain(self, i: int) -> bool:
        """Return whether block i runs only its own parts, in eval mode, so `cls_block` is exact."""
        return is_plain(self.blocks[i]) and self.refuses_block(self.blocks[i]) is None

    def finish(self, tokens: Tensor) -> Tensor:
        """Run the final norm, before pooling."""
        raise NotImplementedError


def per_sublayer(*names: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names for each sublayer of a block; {} is its number, 1 or 2."""
    return tuple(name.format(1) for name in names), tuple(name.format(2) for name in names)


def part(module: nn.Module, name: str) -> nn.Module | Tensor | float | None:
    """Return the inner module, parameter or number `name`, with dots; None if there is none."""
    inner = module
    for attribute in name.split("."):
        inner = getattr(inner, attribute, None)
    return inner


def run(module: nn.Module, names: Iterable[str], x: Tensor) -> Tensor:
    """Run parts of a module in order: call modules, multiply by the others, skip what is absent."""
    for name in names:
        inner = part(module, name) if "." in name else getattr(module, name, None)
        if isinstance(inner, nn.Module):
            x = inner(x)
        elif inner is not None:
            x = inner * x
    return x


def normed(norm: nn.Module | None, heads: Tensor) -> Tensor:
    """Return queries or keys (B, H, N, d) after the norm of each head, if there is one."""
    return heads if norm is None else norm(heads)


def plain_mlp_ratio(width: int, *mlp: nn.Module) -> float:
    """Return the ratio of an MLP in parts; of a gated MLP, that of a plain one of its weights."""
    modules = (m for part in mlp for m in (part, *part.children()))
    linears = (m for m in modules if hasattr(m, "in_features"))
    return sum(m.in_features * m.out_features for m in linears) / (2 * width**2)


def interpolated(positions: Tensor, grid: tuple[int, int], to: tuple[int, int], p: int) -> Tensor:
    """Resize position embeddings (p + rows * columns, D) from one grid of patches to another.

    The embeddings of the p prefix tokens stay.
    """
    if grid == to:
        return positions
    at_least_fp32 = torch.promote_types(positions.dtype, torch.float32)
    table = positions[p:].to(at_least_fp32).unflatten(0, grid).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=to, mode="bicubic", antialias=True, align_corners=False)
    table = table[0].flatten(1).T.to(positions.dtype)
    return torch.cat([positions[:p], table])
