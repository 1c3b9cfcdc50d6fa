"""One stage boundary, once: fuse the text into CLS, score, reduce (ELIP, Eq. 1-4).

    x~_cls = lam * x_cls + (1 - lam) * t_cls                                               Eq. 1
    a      = CLS attention row of the stage's last layer, by the scorer, without gradient  Eq. 2
    x      = [x_cls, x_kept, sum_dropped w x]                        elip_kernels.reduce, Eq. 3-4

`encode_image` and the hooks of `reduce_` both call `reduce_stage` and nothing else.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from typing import Literal, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels import ReductionInfo
from elip_models.reduction.schedule import Schedule, Stage
from elip_models.towers import Tower, with_cls

P = ParamSpec("P")
R = TypeVar("R")


class StageInfo(NamedTuple):
    """What one stage did: its place, what was kept and merged, and the attention row (B, N)."""

    stage: Stage
    reduction: ReductionInfo
    attention: Tensor


class Scorer(NamedTuple):
    """A way to get the attention row that selects.

    row: (tower, stage, tokens (B, N, D), fused cls (B, D)) -> (B, N), column 0 is CLS.
    layers: how many whole layers it runs on the stage's tokens, of the stage's number of layers.
    reads: the layer whose row it reads from the tokens as they enter, where it does no more: the
        boundary is then one op.
    """

    row: Callable[[Tower, Stage, Tensor, Tensor], Tensor]
    layers: Callable[[int], int]
    reads: Callable[[Stage], int] | None = None


def _official(tower: Tower, stage: Stage, tokens: Tensor, cls: Tensor) -> Tensor:
    """All layers whole, the last with its N x N map, its output thrown away."""
    last = stage.first + stage.layers - 1
    tokens = with_cls(tokens, cls)
    for i in range(stage.first, last):
        tokens = tower.dry_block(i, tokens)
    with tower.gathered(last, tokens) as (tokens,):
        row = tower.attention_map(last, tokens)[:, :, 0].mean(1)
        tower.mlp(last, tower.attend(last, tokens))
    return row


def _exact(tower: Tower, stage: Stage, tokens: Tensor, cls: Tensor) -> Tensor:
    """All layers but the last, then only the CLS row of the last."""
    return _after(stage.layers)(tower, stage, tokens, cls)


def _after(layer: int) -> Callable[[Tower, Stage, Tensor, Tensor], Tensor]:
    """The CLS row of the stage's `layer`-th layer (from 1), after the whole layers before it."""

    def row(tower: Tower, stage: Stage, tokens: Tensor, cls: Tensor) -> Tensor:
        target = stage.first + layer - 1
        if layer > 1:
            tokens = with_cls(tokens, cls)
            for i in range(stage.first, target):
                tokens = tower.dry_block(i, tokens)
            cls = tokens[:, 0]
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
    "official": Scorer(_official, lambda layers: layers),
    "exact": Scorer(_exact, lambda layers: layers - 1),
    "cls": Scorer(_cls, lambda layers: 0),
    "last": Scorer(_last, lambda layers: 0, lambda stage: stage.first + stage.layers - 1),
}


def get_scorer(name: str | int) -> Scorer:
    """The scorer of a name in `SCORERS`, or of m: m-1 whole layers, then the m-th layer's row."""
    if isinstance(name, int):
        return Scorer(_after(name), lambda layers: name - 1)
    return SCORERS[name]


@dataclass(frozen=True)
class ElipSettings:
    """How ELIP reduces a tower; the arguments of `encode_image` and `reduce_` of the same names.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
    """

    schedule: Schedule
    scorer: str | int = "exact"
    fusion: float = 0.8
    guidance_norm: Literal["none", "match"] = "none"
    without_text: Literal["dense", "vision"] = "dense"
    merge: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", Schedule.parse(self.schedule))
        scorer = self.scorer
        is_name = isinstance(scorer, str) and scorer in SCORERS
        if isinstance(scorer, bool) or not (is_name or isinstance(scorer, int)):
            raise ValueError(f"scorer: expected one of {list(SCORERS)} or an int, got {scorer!r}")
        lengths = [layers for layers, ratio in self.schedule.groups if ratio < 1]
        shortest = min(lengths) if lengths else self.schedule.depth
        if isinstance(scorer, int) and not 1 <= scorer <= shortest:
            raise ValueError(
                f"scorer: expected 1 <= m <= {shortest}, the layers of the shortest stage of "
                f"'{self.schedule}', got {scorer}"
            )
        fusion = self.fusion
        if isinstance(fusion, bool) or not isinstance(fusion, (int, float)):
            raise TypeError(f"fusion: expected a float in [0, 1], got {fusion!r}")
        if not 0.0 <= fusion <= 1.0:
            raise ValueError(f"fusion: expected a float in [0, 1], got {fusion!r}")
        if not isinstance(self.merge, bool):
            raise TypeError(f"merge: expected True or False, got {self.merge!r}")
        allowed = {"guidance_norm": ("none", "match"), "without_text": ("dense", "vision")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {values}, got {getattr(self, name)!r}")

    def reduces(self, text_cls: Tensor | None) -> bool:
        """Whether a forward with this guidance reduces; warns once where it does not."""
        if text_cls is not None or self.fusion == 1.0 or self.without_text == "vision":
            return True
        if not torch.compiler.is_compiling():
            _warn_once(
                "no text guidance was given, so nothing is reduced (without_text='dense'); "
                "pass text_cls, or without_text='vision' for vision-only reduction"
            )
        return False

    def inference_cost(self, tower: Tower) -> float:
        """Forward multiply-adds of the blocks, scorer included, relative to the dense tower."""
        scorer = get_scorer(self.scorer)
        stages = stages_of(self.schedule, tower.num_patches)
        scored = tuple(scorer.layers(stage.layers) for stage in stages)
        shape = (tower.num_patches, tower.num_prefix_tokens, tower.width, tower.mlp_ratio)
        return _inference_cost(self.schedule, self.merge, scored, *shape)


def _once(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run once for equal arguments; the compiler, which warns of caches, traces it."""
    cached = cache(function)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return (function if torch.compiler.is_compiling() else cached)(*args, **kwargs)

    return run


@_once
def stages_of(schedule: Schedule, num_patches: int) -> tuple[Stage, ...]:
    """`schedule.stages`, worked out once and not in every forward."""
    return schedule.stages(num_patches)


@_once
def _inference_cost(
    schedule: Schedule,
    merge: bool,
    scored: tuple[int, ...],
    num_patches: int,
    num_prefix_tokens: int,
    width: int,
    mlp_ratio: float,
) -> float:
    """`scored`: the layers that the scorer runs on what enters each stage."""

    def block(tokens: int) -> float:
        """Multiply-adds of one block: projections, MLP, attention."""
        return tokens * width * ((4 + 2 * mlp_ratio) * width + 2 * tokens)

    dense = num_patches + num_prefix_tokens
    tokens = schedule.tokens_per_layer(
        num_patches, merge=merge, num_prefix_tokens=num_prefix_tokens
    )
    cost = sum(map(block, tokens))
    for stage, layers in zip(schedule.stages(num_patches), scored, strict=True):
        cost += layers * block(tokens[stage.first - 1] if stage.first else dense)
    return cost / (block(dense) * schedule.depth)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def warn_if_slower(tower: Tower, settings: ElipSettings) -> None:
    """In eval mode, say once that the scorer costs more than the reduction saves."""
    if tower.model.training or torch.compiler.is_compiling():
        return
    cost = settings.inference_cost(tower)
    if cost > 1.0:
        _warn_once(
            f"scorer={settings.scorer!r} makes inference cost {cost:.2f} times the dense tower "
            "(FLOPs of the blocks); scorer='last' costs less than dense"
        )


def check_text(text_cls: Tensor, expected: tuple[int, int], device: torch.device) -> None:
    """Raises where the guidance is not one vector of the tower's width for each image, (B, D)."""
    if not isinstance(text_cls, Tensor) or not text_cls.is_floating_point():
        raise TypeError(f"text_cls: expected a floating-point tensor (B, D), got {text_cls!r:.80}")
    if tuple(text_cls.shape) != expected:
        raise ValueError(
            f"text_cls: expected (B, D) = {expected}, one vector of the tower's width an image, "
            f"got {tuple(text_cls.shape)}; project another width first (CLIP maps it back by the "
            "transposed image projection: text_features @ proj.T)"
        )
    if text_cls.device != device:
        raise ValueError(f"text_cls: expected it on {device}, got {text_cls.device}")


def fuse(cls: Tensor, text_cls: Tensor | None, settings: ElipSettings) -> Tensor:
    """Eq. 1: cls (B, D), text_cls (B, D) or None -> the fused CLS token (B, D)."""
    if text_cls is None or settings.fusion == 1.0:
        return cls
    text = text_cls.to(cls.dtype)
    if settings.guidance_norm == "match":
        text = F.normalize(text, dim=1) * cls.norm(dim=1, keepdim=True)
    return settings.fusion * cls + (1.0 - settings.fusion) * text


@contextmanager
def _isolated_rng(tower: Tower, tokens: Tensor) -> Iterator[None]:
    """Random numbers drawn inside leave the state as it was: a replayed stage draws the same."""
    if not tower.model.training or torch.compiler.is_compiling():
        yield
        return
    devices = [tokens.device] if tokens.is_cuda else []
    with torch.random.fork_rng(devices):
        yield


def _uncached_autocast(device: str) -> torch.autocast | nullcontext:
    """The autocast of the caller, without its cache.

    Some releases of torch would hand a weight that was cast here, without gradient, to the training
    pass that follows.
    """
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def score_stage(
    tower: Tower, stage: Stage, tokens: Tensor, text_cls: Tensor | None, settings: ElipSettings
) -> Tensor:
    """Eq. 2: the attention row (B, N) that selects, without gradient; column 0 is CLS."""
    cls = _fused_cls(tokens, text_cls, settings)
    with torch.no_grad(), _isolated_rng(tower, tokens), _uncached_autocast(tokens.device.type):
        return get_scorer(settings.scorer).row(tower, stage, tokens, cls)


@torch.no_grad()
def _fused_cls(tokens: Tensor, text_cls: Tensor | None, settings: ElipSettings) -> Tensor:
    if text_cls is not None:
        check_text(text_cls, (tokens.shape[0], tokens.shape[2]), tokens.device)
    return fuse(tokens[:, 0], text_cls, settings)


def reduce_stage(
    tower: Tower,
    stage: Stage,
    tokens: Tensor,
    text_cls: Tensor | None,
    settings: ElipSettings,
    attention: Tensor | None = None,
) -> tuple[Tensor, StageInfo]:
    """Fuse, score, reduce.

    Args:
        tokens: (B, N, D) that enter block `stage.first`.
        text_cls: (B, D), the text's CLS vector in the tower's width, or None: vision only.
        attention: (B, N), the row of an earlier run, replayed instead of scoring.

    Returns:
        (B, keep+2, D), or keep+1 without merging, and the `StageInfo`.
    """
    reads = get_scorer(settings.scorer).reads
    if (
        attention is None
        and reads is not None
        and stage.keep < tokens.shape[1] - tower.num_prefix_tokens
    ):
        cls = _fused_cls(tokens, text_cls, settings)
        tokens, info, attention = tower.score_reduce(
            reads(stage), tokens, cls, stage.keep, merge=settings.merge
        )
        return tokens, StageInfo(stage, info, attention)
    if attention is None:
        attention = score_stage(tower, stage, tokens, text_cls, settings)
    tokens, info = tower.reduce(tokens, attention, stage.keep, merge=settings.merge)
    return tokens, StageInfo(stage, info, attention)
