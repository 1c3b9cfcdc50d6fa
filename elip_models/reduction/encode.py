"""encode_image: a tower's blocks in order, under a strategy."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, Unpack, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elip_models.reduction.patch import is_reduced_tower
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.step import Forward
from elip_models.reduction.strategies.elip import ELIPOptions, check_text
from elip_models.reduction.strategy import StageInfo, Strategy
from elip_models.reduction.strategy_spec import get_strategy
from elip_models.towers import Tower, as_tower, in_forward


@overload
def encode_image(
    model: nn.Module, images: Tensor, text_cls: Tensor | None = ..., *, keep: float | None = ...,
    schedule: Schedule | str | None = ..., strategy: str | Strategy = ...,
    return_info: Literal[False] = ..., **options: Unpack[ELIPOptions],
) -> Tensor: ...  # fmt: skip
@overload
def encode_image(
    model: nn.Module, images: Tensor, text_cls: Tensor | None = ..., *, keep: float | None = ...,
    schedule: Schedule | str | None = ..., strategy: str | Strategy = ...,
    return_info: Literal[True], **options: Unpack[ELIPOptions],
) -> tuple[Tensor, list[StageInfo]]: ...  # fmt: skip
@overload
def encode_image(
    model: nn.Module, images: Tensor, text_cls: Tensor | None = ..., *, keep: float | None = ...,
    schedule: Schedule | str | None = ..., strategy: str | Strategy = ...,
    return_info: bool, **options: Unpack[ELIPOptions],
) -> Tensor | tuple[Tensor, list[StageInfo]]: ...  # fmt: skip
def encode_image(
    model: nn.Module,
    images: Tensor,
    text_cls: Tensor | None = None,
    *,
    keep: float | None = None,
    schedule: Schedule | str | None = None,
    strategy: str | Strategy = "elip",
    return_info: bool = False,
    **options: Unpack[ELIPOptions],
) -> Tensor | tuple[Tensor, list[StageInfo]]:
    """Run an image tower with token reduction, by default ELIP's (Algorithm 1).

    Args:
        model: an image model that a tower of `elip_models.towers` reads, e.g. from timm.
        images: (B, 3, H, W).
        text_cls: (B, D), the text encoder's CLS output in the tower's width D; detached here. A row
            of zeros is no text: its image alone selects. Strategies that no text guides do not read
            it.
        keep, schedule, strategy, options: as of `reduce_`, but that the strategy is 'elip' where
            none is named. The paper's are scorer='exact' and without_text='dense'.
        return_info: also return a `StageInfo` for every step.

    Returns:
        (B, K+2, D) after the tower's final norm, before pooling (K+1 without merging); one token
        less of a tower without CLS.

    Raises:
        TypeError: a model that cannot be reduced, with the reason.
        ValueError: bad arguments, or a model that `reduce_` has already changed.
    """
    tower = as_tower(model)
    strategy = get_strategy(strategy, schedule=schedule, **options).fitted(tower)
    if keep is not None:
        strategy = strategy.at_keep(tower, keep)
    if not isinstance(return_info, bool):
        raise TypeError(f"return_info: expected True or False, got {return_info!r}")
    _check_images(images, tower)
    if text_cls is not None:
        check_text(text_cls, (images.shape[0], tower.width), images.device)
    tokens, infos = run_tower(tower, images, text_cls, strategy)
    return (tokens, infos) if return_info else tokens


@in_forward
def run_tower(
    tower: Tower,
    images: Tensor,
    text_cls: Tensor | None,
    strategy: Strategy,
    *,
    cls_only: bool = False,
    replays: Sequence[StageInfo] | None = None,
    rows: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, list[StageInfo]]:
    """`encode_image` for arguments that have been checked, once and for all calls.

    cls_only: the caller reads token 0 alone. Without gradient, and where nothing watches the last
    block, that block then runs for this token only, which is exact: the tokens are (B, 1, D).
    replays: what each step did in another tower's run of the same images; here it does the same,
    and nothing is scored.
    rows: what selects in place of a scorer, see `Forward`.
    """
    if is_reduced_tower(tower):
        raise ValueError(
            "model: expected one that reduce_ has not changed, since it would reduce twice, got a "
            "reduced one; call the model itself, or unreduce_ it first"
        )
    last = tower.depth - 1
    cls_only = cls_only and not torch.is_grad_enabled() and tower.is_plain(last)
    text_cls = None if text_cls is None else text_cls.detach()
    tokens = strategy.embed(tower, images)
    num_tokens = None if strategy.changes_embedding else tokens.shape[1]
    forward = Forward(
        tower.at(None), strategy, text_cls, num_tokens=num_tokens, replays=replays, rows=rows
    )
    run = forward.block
    if tower.checkpointing and tower.model.training:
        run = partial(checkpoint, forward.block, use_reentrant=False)
    for i in range(tower.depth):
        tokens, info = run(i, tokens, cls_only=cls_only and i == last)
        if info is not None:
            forward.infos[i] = info
    return tower.finish(tokens), list(forward.infos.values())


def _check_images(images: Tensor, tower: Tower) -> None:
    weight = next(tower.model.parameters())
    size = "H, W" if tower.has_dynamic_size else "{}, {}".format(*tower.image_size)
    expected = f"a floating-point tensor (B, 3, {size})"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected {expected}, got {got}; scale pixels to floats first")
    fits = tower.has_dynamic_size or tuple(images.shape[2:]) == tower.image_size
    if images.dim() != 4 or not fits:
        raise ValueError(
            f"images: expected {expected}, got {tuple(images.shape)}; {tower.size_advice}"
        )
    if images.device != weight.device:
        raise ValueError(f"images: expected them on {weight.device}, got {images.device}")
