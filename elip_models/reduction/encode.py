"""encode_image: the loop over a tower's blocks, with a strategy's steps in it."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elip_models.reduction.patch import is_reduced_tower
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.strategies import get_strategy
from elip_models.reduction.strategies.elip import check_text
from elip_models.reduction.strategy import (
    Context,
    StageInfo,
    Strategy,
    plainly,
    stages_of,
    take_step,
    warn_if_slower,
)
from elip_models.towers import Tower, as_tower, in_forward


def encode_image(
    model: nn.Module,
    images: Tensor,
    text_cls: Tensor | None = None,
    *,
    schedule: Schedule | str | None = None,
    strategy: str | Strategy = "elip",
    scorer: str | int | None = None,
    fusion: float | None = None,
    guidance_norm: Literal["none", "match"] | None = None,
    without_text: Literal["dense", "vision"] | None = None,
    merge: bool | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, list[StageInfo]]:
    """Run an image tower with token reduction, by default ELIP's (Algorithm 1).

    Args:
        model: an image model that a tower of `elip_models.towers` reads, e.g. from timm.
        images: (B, 3, H, W).
        text_cls: (B, D), the text encoder's CLS output in the tower's width D; detached here.
            Strategies that no text guides do not read it.
        schedule: as '2(100%) 2(90%) 6(65%) 2(40%)'; its layers add up to the tower's depth.
        strategy: a name in `elip_models.STRATEGIES`, or an instance, which then holds all options.
        scorer: 'official', 'exact' (the default), 'cls', 'last', or m: m-1 whole layers, then the
            m-th's row.
        fusion: lam of Eq. 1, 0.8; 1 is vision-only, 0 text-only.
        guidance_norm: 'match' rescales text_cls to the norm of the image's CLS token; 'none'.
        without_text: what to do where text_cls is None: 'dense' reduces nothing, 'vision' by
            the image alone.
        merge: append the merged token; True.
        return_info: also return a `StageInfo` for every step.

    Returns:
        (B, K+2, D) after the tower's final norm, before pooling (K+1 without merging); one token
        less of a tower without CLS.

    Raises:
        TypeError: a model that cannot be reduced, with the reason.
        ValueError: bad arguments, or a model that `reduce_` has already changed.
    """
    tower = as_tower(model)
    plan = get_strategy(
        strategy,
        schedule=schedule,
        scorer=scorer,
        fusion=fusion,
        guidance_norm=guidance_norm,
        without_text=without_text,
        merge=merge,
    )
    plan.check(tower)
    if not isinstance(return_info, bool):
        raise TypeError(f"return_info: expected True or False, got {return_info!r}")
    _check_images(images, tower)
    if text_cls is not None:
        check_text(text_cls, (images.shape[0], tower.width), images.device)
    tokens, infos = run_tower(tower, images, text_cls, plan)
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
) -> tuple[Tensor, list[StageInfo]]:
    """`encode_image` for arguments that have been checked, once and for all calls.

    cls_only: the caller reads token 0 alone. Without gradient, and where nothing watches the last
    block, that block then runs for this token only, which is exact: the tokens are (B, 1, D).
    replays: what each step did in another tower's run of the same images; here it does the same,
    and nothing is scored.
    """
    if is_reduced_tower(tower):
        raise ValueError(
            "model: expected one that reduce_ has not changed, since it would reduce twice, got a "
            "reduced one; call the model itself, or unreduce_ it first"
        )
    last, training = tower.depth - 1, tower.model.training
    cls_only = cls_only and not torch.is_grad_enabled() and tower.is_plain(last)
    steps = {}
    if replays is not None or strategy.reduces(text_cls, training):
        steps = {stage.first: stage for stage in stages_of(strategy, tower.size)}
    if steps and replays is None:
        warn_if_slower(tower, strategy)
    run = plainly
    if tower.checkpointing and training:
        run = partial(checkpoint, use_reentrant=False)
    done = {info.stage: info for info in replays or ()}
    context = Context(None if text_cls is None else text_cls.detach(), run=run)
    tokens, infos = strategy.embed(tower, images), []
    tower = tower.at(None)
    for i in range(tower.depth):
        if i in steps:
            context = context._replace(replay=done.get(steps[i]))
            step = partial(take_step, strategy, tower, steps[i], context=context)
            run_step = partial(tower.in_block, i) if strategy.replaces_block else plainly
            tokens, info = run_step(step, tokens)
            if info is not context.before:
                infos.append(info)
            context, tower = context._replace(before=info), tower.at(info.positions)
        if i in steps and strategy.replaces_block:
            continue
        if cls_only and i == last:
            tokens = tower.cls_block(i, tokens, tokens[:, 0])[:, None]
        else:
            tokens = run(tower.block, i, tokens)
    return tower.finish(tokens), infos


def _check_images(images: Tensor, tower: Tower) -> None:
    weight = next(tower.model.parameters())
    expected = f"a floating-point tensor (B, 3, {tower.image_size[0]}, {tower.image_size[1]})"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected {expected}, got {got}; scale pixels to floats first")
    if images.dim() != 4 or tuple(images.shape[2:]) != tower.image_size:
        raise ValueError(f"images: expected {expected}, got {tuple(images.shape)}")
    if images.device != weight.device:
        raise ValueError(f"images: expected them on {weight.device}, got {images.device}")
