"""An image tower of pre-norm blocks: what the reduction computes from the parts of an adapter.

    block:  x = x + project(attention(norm(x)));  x = mlp(x)        tokens x (B, N, D), CLS first

The adapter of a library defines the parts of a block (`tower_parts.py`). Sublayers and stage
boundaries are computed here, once for all libraries, and other rows in `attention_rows.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import elip_kernels
from elip_kernels import ReductionInfo
from elip_kernels.differentiation import has_tangents
from elip_models.towers.attention_rows import AttentionRows
from elip_models.towers.in_place import in_place_of
from elip_models.towers.merge import Merge
from elip_models.towers.tower_data import QKV, Affine, Projections, Query, TowerSize
from elip_models.towers.tower_parts import Block, normed, unwrapped
from elip_models.towers.wrapped_modules import is_layer_norm, is_plain, qkv_of, unsharded
from elip_models.validation import shortened

R = TypeVar("R")


class Tower(AttentionRows):
    """An image model as the reduction reads it; see `TowerParts` for what an adapter defines."""

    @property
    def size(self) -> TowerSize:
        """Return the sizes as plain numbers."""
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
        """Return whether one projection of the tokens gives the head mean of a block's keys."""
        return self.projections(0).k_norm is None and not self.is_rotary

    @property
    def has_positions(self) -> bool:
        """Return whether blocks read the position of each patch."""
        return self.is_rotary or self.adds_bias

    def position_bias(self, i: int) -> Tensor | None:
        """Return what block i adds to its attention scores, (1 or B, H, N, N), or None."""
        return None

    def block(self, i: int, tokens: Tensor) -> Tensor:
        """Run block i."""
        if self.must_run_sublayers:
            return self.in_block(i, lambda x: (self.run_sublayers(i, x), None), tokens)[0]
        return self.call(i, self.blocks[i], tokens)

    @property
    def must_run_sublayers(self) -> bool:
        """Return whether a block's own forward would read other positions than its tokens have."""
        return self.reads_own_positions and self.positions is not None

    @property
    def reads_own_positions(self) -> bool:
        """Return whether a block's own forward reads the positions of all patches in order."""
        return self.adds_bias

    def run_sublayers(self, i: int, tokens: Tensor) -> Tensor:
        """Run both sublayers of block i, inside its forward."""
        return self.mlp(i, self.attend(i, tokens))

    def is_plain(self, i: int) -> bool:
        """Return whether block i runs only its own parts, in eval mode, so `cls_block` is exact."""
        return is_plain(self.blocks[i]) and self.refuses_block(self.blocks[i]) is None

    def call(self, i: int, block: Block, tokens: Tensor) -> Tensor:
        """Call block i, or its forward alone, with the arguments that its model passes."""
        return block(tokens)

    def in_block(
        self, i: int, function: Callable[[Tensor], tuple[Tensor, R]], tokens: Tensor
    ) -> tuple[Tensor, R]:
        """Run `function(tokens) -> (tokens, more)` in place of block i's forward, with gradient."""
        return in_place_of(self.blocks[i], function, tokens)

    def unsharded(self, i: int, *tensors: Tensor) -> AbstractContextManager[tuple[Tensor, ...]]:
        """Gather block i's parameters inside the context, which yields `tensors`."""
        return unsharded(self.blocks[i], *tensors)

    def run_block_without_hooks(self, i: int, tokens: Tensor) -> Tensor:
        """Run block i's own forward to compute scores, without gradient and without hooks.

        FSDP's hooks would free the parameters, and prefetch for a backward that never runs.
        """
        block = self.blocks[i]
        forward = vars(block).get("forward")
        forward = original_method(block, "forward", getattr(forward, "replaced", forward))
        with self.unsharded(i, tokens) as (tokens,):
            if self.must_run_sublayers:
                return self.run_sublayers(i, tokens)
            return self.call(i, forward, tokens)

    def attend(
        self, i: int, tokens: Tensor, bias: Tensor | None = None, *, qkv: QKV | None = None
    ) -> Tensor:
        """Run block i's attention sublayer, residual included.

        Args:
            i: the block.
            tokens: (B, N, D).
            bias: added to the attention scores.
            qkv: the block's queries, keys and values, if the caller has computed them.
        """
        q, k, v = self.qkv(i, tokens) if qkv is None else qkv
        own = self.position_bias(i)
        if own is not None:
            own = own[:, :, : q.shape[2]]  # of the first tokens, if these alone attend
            bias = own if bias is None else own + bias
        # fused attention has no tangent
        with sdpa_kernel(SDPBackend.MATH) if has_tangents(q, k, v) else nullcontext():
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=self.attention_dropout(i), scale=self.scale
            )
        return tokens + self.project(i, attended.transpose(1, 2).flatten(2))

    def projections(self, i: int) -> Projections:
        """Return the modules around block i's projections."""
        norm = unwrapped(getattr(self.blocks[i], self.names.norm1))
        return Projections(norm, self.num_heads, self.scale, *self._head_norms(self._attention(i)))

    def weights(self, i: int) -> list[Affine] | None:
        """Return block i's query, key and value projections, each (D, D) as in nn.Linear.

        None means that their effect cannot be read from weights; call `qkv` instead.
        """
        return qkv_of(*self._layers(self._attention(i)))

    def _attention(self, i: int) -> nn.Module:
        """Return block i's attention, which may have been wrapped since the tower was made."""
        attn = unwrapped(getattr(self.blocks[i], self.names.attn))
        reason = self.refuses_attention(attn)
        if reason is not None:
            raise TypeError(
                f"model: expected the library's own attention in block {i}, but {reason}; "
                "unreduce_ the model before its attention changes"
            )
        return attn

    def _layers(self, attn: nn.Module) -> list[nn.Module]:
        """Return the projections: one joint layer, or those of queries, keys and values."""
        return [attrgetter(name)(attn) for name in self.names.qkv]

    def _head_norms(self, attn: nn.Module) -> list[nn.Module | None]:
        """Return the norms of each head's queries and keys, or None for each."""
        norms = [getattr(attn, name, None) for name in self.names.head_norms]
        return [None if isinstance(norm, nn.Identity) else norm for norm in norms]

    def absorbed(self, i: int, *, values: bool = False) -> dict[str, Any] | None:
        """Return the arguments of `cls_attention_from_tokens` for block i.

        None if the key projection cannot fold into the query. With `values`, they are the arguments
        of `cls_attention_output`.
        """
        parts = self.projections(i)
        has_head_norms = parts.q_norm is not None or parts.k_norm is not None
        can_fold = self.absorbs_keys and not has_head_norms and is_layer_norm(parts.norm)
        weights = self.weights(i) if can_fold else None
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

    def mean_keys(self, i: int, tokens: Tensor) -> Tensor:
        """Return block i's keys of `tokens` (B, N, D), averaged over heads: (B, N, d).

            k_n = mean_h(W_h) norm(x_n) + mean_h(b_h)           one product of D x d
            k_n = mean_h(r_n norm_k(W_h norm(x_n) + b_h))       with a key norm, or rotations r_n

        The result has no gradient.
        """
        with scoring_context(self.trunk, tokens), self.unsharded(i, tokens) as (tokens,):
            parts, weights = self.projections(i), self.weights(i)
            if weights is None:
                return self.qkv(i, tokens)[1].mean(1)
            tokens, key, heads = parts.norm(tokens), weights[1], parts.num_heads
            if self.averages_keys:
                means = (None if w is None else w.unflatten(0, (heads, -1)).mean(0) for w in key)
                return F.linear(tokens, *means)
            keys = key(tokens).unflatten(2, (heads, -1)).transpose(1, 2)
            return self.rotated(i, normed(parts.k_norm, keys)).mean(1)

    def score_reduce(
        self,
        i: int,
        tokens: Tensor,
        scored: Tensor,
        query: Query,
        *,
        keep: int,
        merge: Merge,
        row: Tensor | None = None,
    ) -> tuple[Tensor, ReductionInfo, Tensor]:
        """Select among `tokens` by block i's CLS attention row over `scored`.

        Args:
            i: the block whose projections score.
            tokens: (B, N, D), the tokens to reduce.
            scored: (B, N, D), `tokens` themselves, or the output of a dry run.
            query: the token that scores.
            keep: the number of patches to keep.
            merge: 'one' or 'none', see `Merge`.
            row: (B, N) scores that are known already; nothing is scored then.

        Returns:
            The reduced tokens, what was kept, and the row (B, N).
        """
        with self.unsharded(i, scored, query.cls) as (read, cls):
            arguments = self.absorbed(i) if self.num_prefix_tokens == 1 else None
            if arguments is not None:
                arguments |= query._replace(cls=cls)._asdict()
                arguments |= {"scored": None if read is tokens else read, "row": row}
                return elip_kernels.score_reduce(
                    tokens, keep=keep, merge=_merge_flag(merge), return_info=True, **arguments
                )
        if row is None:
            with scoring_context(self.trunk, tokens):
                row = self.cls_attention(i, scored, query.fused())
        return *self.reduce(tokens, row, keep, merge=merge), row

    def reduce(
        self, tokens: Tensor, row: Tensor, keep: int, *, merge: Merge
    ) -> tuple[Tensor, ReductionInfo]:
        """Reduce tokens (B, N, D) by a row (B, N) of scores; prefix tokens stay."""
        return elip_kernels.reduce(
            tokens,
            row,
            keep,
            merge=_merge_flag(merge),
            num_prefix_tokens=self.num_prefix_tokens,
            return_info=True,
        )


def _merge_flag(merge: Merge) -> bool:
    """Return what `elip_kernels` takes as `merge` for 'one' and 'none'."""
    if merge not in ("one", "none"):
        raise ValueError(f"merge: expected 'one' or 'none', got {shortened(merge)}")
    return merge == "one"


def original_method(owner: Any, name: str, replaced: Any) -> Callable[..., Any]:
    """Return what `owner.name` runs without `reduce_`.

    That is `replaced`, the caller's own replacement, or the method of the class if it is None.
    """
    return partial(getattr(type(owner), name), owner) if replaced is None else replaced


@contextmanager
def scoring_context(model: nn.Module, tensor: Tensor) -> Iterator[None]:
    """Run the code inside without gradient and without effect on the pass around it.

    On the device of `tensor`, random state and autocast cache stay as if nothing had run: dropout
    draws the same numbers whether a selection is computed or replayed.
    """
    with torch.no_grad(), _isolated_rng(model, tensor), _uncached_autocast(tensor.device.type):
        yield


def _isolated_rng(model: nn.Module, tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context that restores the random state, if the model is in training mode."""
    if not model.training or torch.compiler.is_compiling():
        return nullcontext()
    return torch.random.fork_rng([tensor.device] if tensor.is_cuda else [])


def _uncached_autocast(device: str) -> torch.autocast | nullcontext:
    """Return the caller's autocast without its cache.

    Some releases of torch would reuse a weight that was cast here, without gradient, in the
    training pass that follows.
    """
    if torch.compiler.is_compiling() or device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
