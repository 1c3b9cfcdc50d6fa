"""Scorers: functions that compute the attention row of a stage (ELIP, Eq. 2).

A scorer defines which row is read, after which layers, and its cost. In a tower without CLS token
the text is the query, and is no token of any layer. The scorer 'received' needs no query: a token's
score is the attention that it receives.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elip_kernels import attention_column_mean
from elip_models.strategies.schedule import Stage
from elip_models.towers import Query, Tower
from elip_models.validation import PositiveInt


class ScoringInput(NamedTuple):
    """The inputs of the attention row of block `layer`, over `tokens` (B, N, D) that enter it."""

    layer: int
    tokens: Tensor
    query: Query


class Scorer(NamedTuple):
    """A way to compute the attention row that selects, and its cost.

    The counts are functions of the stage's number of layers.

    Attributes:
        read: (tower, stage, tokens (B, N, D), query) -> the inputs of the row of one block. Scoring
            and reduction then run as one op.
        row: (tower, stage, tokens, query) -> (B, N), column 0 being CLS, for a scorer that does not
            read one block's row.
        layers: the number of whole layers that run on the stage's tokens.
        attention_sublayers: the number of layers that run without their MLP.
        rows: the number of rows in which the CLS token alone attends to the tokens.
        cls_blocks: the number of layers that the CLS token alone passes, without its attention.
        received: the number of layers in which the attention between all tokens is read.
        uses_query: the CLS token or a text changes the row.
    """

    read: Callable[[Tower, Stage, Tensor, Query], ScoringInput] | None = None
    row: Callable[[Tower, Stage, Tensor, Query | None], Tensor] | None = None
    layers: Callable[[int], int] = lambda layers: 0
    attention_sublayers: Callable[[int], int] = lambda layers: 0
    rows: Callable[[int], int] = lambda layers: 1
    cls_blocks: Callable[[int], int] = lambda layers: 0
    received: Callable[[int], int] = lambda layers: 0
    uses_query: bool = True


def row_of(
    scorer: Scorer, tower: Tower, stage: Stage, tokens: Tensor, query: Query | None
) -> Tensor:
    """Return the row (B, N) of a scorer, column 0 being CLS; `query` may be None if unused."""
    if scorer.read is None:
        return scorer.row(tower, stage, tokens, query)
    layer, tokens, query = scorer.read(tower, stage, tokens, query)
    return tower.cls_attention(layer, tokens, query.fused())


def _official(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> Tensor:
    """Run all layers, the last with its N x N map, and discard the output."""
    last = stage.last
    tokens = query.into(tokens)
    for i in range(stage.first, last):
        tokens = tower.run_block_without_hooks(i, tokens)
    with tower.unsharded(last, tokens) as (tokens,):
        qkv = tower.qkv(last, tokens)
        attention = tower.attention_map(last, tokens, qkv=qkv)
        attended = (attention @ qkv[2]).transpose(1, 2).flatten(2)
        tower.mlp(last, tokens + tower.project(last, attended))
    return attention[:, :, 0].mean(1)


def _exact(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """Run all layers but the last, then read the CLS row of the last."""
    return _after(tower, range(stage.first, stage.last), stage.last, tokens, query)


def _bf16(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """Run `exact` with matrix products in bf16; tokens other than fp32 keep their dtype."""
    device = tokens.device.type
    if tokens.dtype != torch.float32 or device == "meta":  # meta has no autocast
        return _exact(tower, stage, tokens, query)
    with torch.autocast(device, torch.bfloat16, cache_enabled=False):
        return _exact(tower, stage, tokens, query)


def _alternate(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """Run every second layer from the first, then read the CLS row of the last."""
    return _after(tower, range(stage.first, stage.last, 2), stage.last, tokens, query)


def _attention(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """Run the attention of all layers but the last, without MLP, then read the last's CLS row."""
    before = range(stage.first, stage.last)
    return _after(tower, before, stage.last, tokens, query, run=_attention_half)


def _ordinal(layer: int) -> Callable[[Tower, Stage, Tensor, Query], ScoringInput]:
    """Return a scorer that runs layers up to the `layer`-th (from 1) and reads its CLS row."""

    def read(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
        target = stage.first + layer - 1
        return _after(tower, range(stage.first, target), target, tokens, query)

    return read


def _cls(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """Pass CLS alone through the layers, attending to the tokens that entered the stage."""
    cls = query.fused()
    for i in range(stage.first, stage.last):
        cls = tower.cls_block(i, tokens, cls)
    return ScoringInput(stage.last, tokens, Query(cls))


def _mean(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> Tensor:
    """Return the mean of all layers' CLS rows over the tokens that entered the stage."""
    layers, cls = range(stage.first, stage.last + 1), query.fused()
    return torch.stack([tower.cls_attention(i, tokens, cls) for i in layers]).mean(0)


def _received(tower: Tower, stage: Stage, tokens: Tensor, query: Query | None) -> Tensor:
    """Return the attention that each token receives from all tokens in the last layer."""
    with tower.unsharded(stage.last, tokens) as (tokens,):
        q, k, v = tower.qkv(stage.last, tokens)
        if tower.adds_bias:
            return tower.attention_map(stage.last, tokens, qkv=(q, k, v)).mean((1, 2))
        return attention_column_mean(q, k, scale=tower.projections(stage.last).scale)


def _last(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """Read the last layer's CLS row over the tokens that entered the stage; run no layer."""
    return ScoringInput(stage.last, tokens, query)


def _attention_half(tower: Tower, i: int, tokens: Tensor) -> Tensor:
    """Run the attention of block i, without its MLP."""
    with tower.unsharded(i, tokens) as (tokens,):
        return tower.attend(i, tokens)


def _block(tower: Tower, i: int, tokens: Tensor) -> Tensor:
    """Run block i; its output is used for scoring alone."""
    return tower.run_block_without_hooks(i, tokens)


def _after(
    tower: Tower,
    before: Sequence[int],
    target: int,
    tokens: Tensor,
    query: Query,
    *,
    run: Callable[[Tower, int, Tensor], Tensor] = _block,
) -> ScoringInput:
    """Return the inputs of the CLS row of block `target` after running the blocks `before`.

    In a tower without CLS token the text is the query of the row.
    """
    if before:
        tokens = query.into(tokens) if tower.has_cls else tokens
        for i in before:
            tokens = run(tower, i, tokens)
        query = Query(tokens[:, 0]) if tower.has_cls else query
    return ScoringInput(target, tokens, query)


SCORERS: dict[str, Scorer] = {
    "official": Scorer(row=_official, layers=lambda layers: layers, rows=lambda layers: 0),
    "exact": Scorer(_exact, layers=lambda layers: layers - 1),
    "bf16": Scorer(_bf16, layers=lambda layers: layers - 1),
    "alternate": Scorer(_alternate, layers=lambda layers: layers // 2),
    "attention": Scorer(_attention, attention_sublayers=lambda layers: layers - 1),
    "cls": Scorer(_cls, rows=lambda layers: 2 * layers - 1, cls_blocks=lambda layers: layers - 1),
    "mean": Scorer(row=_mean, rows=lambda layers: layers),
    "last": Scorer(_last),
    "received": Scorer(
        row=_received, rows=lambda layers: 0, received=lambda layers: 1, uses_query=False
    ),
}
ScorerName = (
    Literal[
        "official", "exact", "bf16", "alternate", "attention", "cls", "mean", "last", "received"
    ]
    | PositiveInt
)


def get_scorer(name: str | int) -> Scorer:
    """Return the scorer of a name, or of an int m: run m-1 layers, then read the m-th's row."""
    if isinstance(name, int):
        return Scorer(_ordinal(name), layers=lambda layers: name - 1)
    return SCORERS[name]
