"""Where the attention row of a stage comes from (ELIP, Eq. 2): a table of small functions.

A scorer says which row is read, after which layers, and what that costs. A new one is ten lines
here. In a tower without CLS the text stands in for the CLS token, and is no token of any layer; or
nobody asks, and a token counts by the attention that it receives.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elip_kernels import attention_column_mean
from elip_models.reduction.schedule import Stage
from elip_models.towers import Query, Tower
from elip_models.validation import PositiveInt


class ScoringInput(NamedTuple):
    """A row of attention: that of block `layer` over `tokens` (B, N, D) as they enter it."""

    layer: int
    tokens: Tensor
    query: Query


class Scorer(NamedTuple):
    """A way to get the attention row that selects.

    read: (tower, stage, tokens (B, N, D), query) -> the one row that it reads; a stage boundary is
        one op then, behind what runs before it.
    row: (tower, stage, tokens, query) -> (B, N), column 0 is CLS, where it is not one block's.
    layers: how many whole layers it runs on the stage's tokens, of the stage's number of layers.
    attention_halves: how many layers without their MLP, likewise.
    rows: how often CLS alone attends to these tokens, likewise.
    cls_blocks: how many layers CLS goes through alone, its attention to the tokens aside, likewise.
    received: of how many layers it reads what all tokens pay each other, likewise.
    uses_query: the CLS token or a text does; else neither changes the row.
    """

    read: Callable[[Tower, Stage, Tensor, Query], ScoringInput] | None = None
    row: Callable[[Tower, Stage, Tensor, Query | None], Tensor] | None = None
    layers: Callable[[int], int] = lambda layers: 0
    attention_halves: Callable[[int], int] = lambda layers: 0
    rows: Callable[[int], int] = lambda layers: 1
    cls_blocks: Callable[[int], int] = lambda layers: 0
    received: Callable[[int], int] = lambda layers: 0
    uses_query: bool = True


def row_of(
    scorer: Scorer, tower: Tower, stage: Stage, tokens: Tensor, query: Query | None
) -> Tensor:
    """The row (B, N) that `scorer` selects by, column 0 being CLS; no query where none asks."""
    if scorer.read is None:
        return scorer.row(tower, stage, tokens, query)
    layer, tokens, query = scorer.read(tower, stage, tokens, query)
    return tower.cls_attention(layer, tokens, query.fused())


def _official(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> Tensor:
    """All layers whole, the last with its N x N map, its output thrown away."""
    last = stage.last
    tokens = query.into(tokens)
    for i in range(stage.first, last):
        tokens = tower.dry_block(i, tokens)
    with tower.unsharded(last, tokens) as (tokens,):
        qkv = tower.qkv(last, tokens)
        attention = tower.attention_map(last, tokens, qkv=qkv)
        attended = (attention @ qkv[2]).transpose(1, 2).flatten(2)
        tower.mlp(last, tokens + tower.project(last, attended))
    return attention[:, :, 0].mean(1)


def _exact(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """All layers but the last, then only the CLS row of the last."""
    return _after(tower, range(stage.first, stage.last), stage.last, tokens, query)


def _bf16(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """`exact`, its products of matrices in bf16; tokens of another dtype than fp32 keep theirs."""
    device = tokens.device.type
    if tokens.dtype != torch.float32 or device == "meta":  # which has no autocast
        return _exact(tower, stage, tokens, query)
    with torch.autocast(device, torch.bfloat16, cache_enabled=False):
        return _exact(tower, stage, tokens, query)


def _alternate(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """Every second layer, the first of the stage among them, then the CLS row of the last."""
    return _after(tower, range(stage.first, stage.last, 2), stage.last, tokens, query)


def _attention(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """The attention halves of all layers but the last, no MLP, then the CLS row of the last."""
    before = range(stage.first, stage.last)
    return _after(tower, before, stage.last, tokens, query, run=_attention_half)


def _ordinal(layer: int) -> Callable[[Tower, Stage, Tensor, Query], ScoringInput]:
    """The CLS row of the stage's `layer`-th layer (from 1), after the whole layers before it."""

    def read(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
        target = stage.first + layer - 1
        return _after(tower, range(stage.first, target), target, tokens, query)

    return read


def _cls(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """CLS alone goes through the layers, attending to the tokens as they entered the stage."""
    cls = query.fused()
    for i in range(stage.first, stage.last):
        cls = tower.cls_block(i, tokens, cls)
    return ScoringInput(stage.last, tokens, Query(cls))


def _mean(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> Tensor:
    """The mean of all layers' CLS rows, from the tokens as they entered the stage."""
    layers, cls = range(stage.first, stage.last + 1), query.fused()
    return torch.stack([tower.cls_attention(i, tokens, cls) for i in layers]).mean(0)


def _received(tower: Tower, stage: Stage, tokens: Tensor, query: Query | None) -> Tensor:
    """What each token receives from all others in the last layer, as they entered the stage."""
    with tower.unsharded(stage.last, tokens) as (tokens,):
        q, k, _ = tower.qkv(stage.last, tokens)
        return attention_column_mean(q, k, scale=tower.projections(stage.last).scale)


def _last(tower: Tower, stage: Stage, tokens: Tensor, query: Query) -> ScoringInput:
    """The last layer's CLS row, from the tokens as they entered the stage: no layer runs."""
    return ScoringInput(stage.last, tokens, query)


def _attention_half(tower: Tower, i: int, tokens: Tensor) -> Tensor:
    with tower.unsharded(i, tokens) as (tokens,):
        return tower.attend(i, tokens)


def _block(tower: Tower, i: int, tokens: Tensor) -> Tensor:
    return tower.dry_block(i, tokens)


def _after(
    tower: Tower,
    before: Sequence[int],
    target: int,
    tokens: Tensor,
    query: Query,
    *,
    run: Callable[[Tower, int, Tensor], Tensor] = _block,
) -> ScoringInput:
    """The CLS row of block `target`, after `run` of the blocks `before`; of a tower without CLS,
    the text's row.
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
    "attention": Scorer(_attention, attention_halves=lambda layers: layers - 1),
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
    """The scorer of a name in `SCORERS`, or of m: m-1 whole layers, then the m-th layer's row."""
    if isinstance(name, int):
        return Scorer(_ordinal(name), layers=lambda layers: name - 1)
    return SCORERS[name]
