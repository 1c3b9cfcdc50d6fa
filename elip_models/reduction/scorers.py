"""Where the attention row of a stage comes from (ELIP, Eq. 2): a table of small functions.

A scorer is (tower, stage, tokens, fused cls) -> row, and its cost. A new one is ten lines here.
In a tower without CLS the text stands in for the fused cls, and is no token of any layer.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from elip_models.reduction.schedule import Stage
from elip_models.towers import Tower, with_cls
from elip_models.validation import PositiveInt


class Scorer(NamedTuple):
    """A way to get the attention row that selects.

    row: (tower, stage, tokens (B, N, D), fused cls (B, D)) -> (B, N), column 0 is CLS.
    layers: how many whole layers it runs on the stage's tokens, of the stage's number of layers.
    rows: how often CLS alone attends to these tokens, likewise.
    cls_blocks: how many layers CLS goes through alone, its attention to the tokens aside, likewise.
    reads: the layer whose row it reads from the tokens as they enter, where it does no more: the
        boundary is then one op.
    """

    row: Callable[[Tower, Stage, Tensor, Tensor], Tensor]
    layers: Callable[[int], int]
    rows: Callable[[int], int] = lambda layers: 1
    cls_blocks: Callable[[int], int] = lambda layers: 0
    reads: Callable[[Stage], int] | None = None


def _official(tower: Tower, stage: Stage, tokens: Tensor, cls: Tensor) -> Tensor:
    """All layers whole, the last with its N x N map, its output thrown away."""
    last = stage.first + stage.layers - 1
    tokens = with_cls(tokens, cls)
    for i in range(stage.first, last):
        tokens = tower.dry_block(i, tokens)
    with tower.unsharded(last, tokens) as (tokens,):
        qkv = tower.qkv(last, tokens)
        attention = tower.attention_map(last, tokens, qkv=qkv)
        attended = (attention @ qkv[2]).transpose(1, 2).flatten(2)
        tower.mlp(last, tokens + tower.project(last, attended))
    return attention[:, :, 0].mean(1)


def _exact(tower: Tower, stage: Stage, tokens: Tensor, cls: Tensor) -> Tensor:
    """All layers but the last, then only the CLS row of the last."""
    return _after(stage.layers)(tower, stage, tokens, cls)


def _after(layer: int) -> Callable[[Tower, Stage, Tensor, Tensor], Tensor]:
    """The CLS row of the stage's `layer`-th layer (from 1), after the whole layers before it; of a
    tower without CLS, the text's row."""

    def row(tower: Tower, stage: Stage, tokens: Tensor, cls: Tensor) -> Tensor:
        target = stage.first + layer - 1
        if layer > 1:
            tokens = with_cls(tokens, cls) if tower.has_cls else tokens
            for i in range(stage.first, target):
                tokens = tower.dry_block(i, tokens)
            cls = tokens[:, 0] if tower.has_cls else cls
        return tower.cls_attention(target, tokens, cls)

    return row


def _cls(tower: Tower, stage: Stage, tokens: Tensor, cls: Tensor) -> Tensor:
    """CLS alone goes through the layers, attending to the tokens as they entered the stage."""
    last = stage.first + stage.layers - 1
    for i in range(stage.first, last):
        cls = tower.cls_block(i, tokens, cls)
    return tower.cls_attention(last, tokens, cls)


def _last(tower: Tower, stage: Stage, tokens: Tensor, cls: Tensor) -> Tensor:
    """The last layer's CLS row, from the tokens as they entered the stage: no layer runs."""
    return tower.cls_attention(stage.first + stage.layers - 1, tokens, cls)


SCORERS: dict[str, Scorer] = {
    "official": Scorer(_official, layers=lambda layers: layers, rows=lambda layers: 0),
    "exact": Scorer(_exact, layers=lambda layers: layers - 1),
    "cls": Scorer(
        _cls,
        layers=lambda layers: 0,
        rows=lambda layers: 2 * layers - 1,
        cls_blocks=lambda layers: layers - 1,
    ),
    "last": Scorer(_last, layers=lambda layers: 0, reads=lambda s: s.first + s.layers - 1),
}
ScorerName = Literal["official", "exact", "cls", "last"] | PositiveInt


def get_scorer(name: str | int) -> Scorer:
    """The scorer of a name in `SCORERS`, or of m: m-1 whole layers, then the m-th layer's row."""
    if isinstance(name, int):
        return Scorer(_after(name), lambda layers: name - 1)
    return SCORERS[name]
