"""encode_image: the loop over a tower's blocks, with a reduction before each stage's first."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elip_models.reduction.patch import is_reduced
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.stage import (
    ElipSettings,
    StageInfo,
    check_text,
    reduce_stage,
    stages_of,
    warn_if_slower,
)
from elip_models.towers import Tower, as_tower, in_forward


def encode_image(
    model: nn.Module,
    images: Tensor,
    text_cls: Tensor | None = None,
    *,
    schedule: Schedule | str,
    scorer: str | int = "exact",
    fusion: float = 0.8,
    guidance_norm: Literal["none", "match"] = "none",
    without_text: Literal["dense", "vision"] = "dense",
    merge: bool = True,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, list[StageInfo]]:
    """Run an image tower with text-guided token reduction (ELIP, Algorithm 1).

    Args:
        model: an image model that a tower of `elip_models.towers` reads, e.g. from timm.
        images: (B, 3, H, W).
        text_cls: (B, D), the text encoder's CLS output in the tower's width D; detached here.
        schedule: as '2(100%) 2(90%) 6(65%) 2(40%)'; its layers add up to the tower's depth.
        scorer: 'official', 'exact', 'cls', 'last', or m: m-1 whole layers, then the m-th's row.
        fusion: lam of Eq. 1; 1 is vision-only, 0 text-only.
        guidance_norm: 'match' rescales text_cls to the norm of the image's CLS token.
        without_text: what to do where text_cls is None: 'dense' reduces nothing, 'vision' reduces
            by the image alone.
        merge: append the merged token.
        return_info: also return a `StageInfo` for every stage.

    Returns:
        (B, K+2, D) after the tower's final norm, before pooling (K+1 without merging).

    Raises:
        TypeError: a model that cannot be reduced, with the reason.
        ValueError: bad arguments, or a model that `reduce_` has already changed.
    """
    tower = as_tower(model)
    settings = ElipSettings(schedule, scorer, fusion, guidance_norm, without_text, merge)
    settings.schedule.check_depth(tower.depth)
    if not isinstance(return_info, bool):
        raise TypeError(f"return_info: expected True or False, got {return_info!r}")
    _check_images(images, tower)
    if text_cls is not None:
        check_text(text_cls, (images.shape[0], tower.width), images.device)
    tokens, infos = run_tower(tower, images, text_cls, settings)
    return (tokens, infos) if return_info else tokens


@in_forward
def run_tower(
    tower: Tower,
    images: Tensor,
    text_cls: Tensor | None,
    settings: ElipSettings,
    *,
    cls_only: bool = False,
) -> tuple[Tensor, list[StageInfo]]:
    """`encode_image` for arguments that have been checked, once and for all calls.

    cls_only: the caller reads token 0 alone. Without gradient, and where nothing watches the last
    block, that block then runs for this token only, which is exact: the tokens are (B, 1, D).
    """
    if is_reduced(tower.blocks):
        raise ValueError(
            "model: expected one that reduce_ has not changed, since it would reduce twice, got a "
            "reduced one; call the model itself, or unreduce_ it first"
        )
    cls_only = cls_only and not torch.is_grad_enabled() and tower.is_plain(tower.depth - 1)
    stages = {}
    if settings.reduces(text_cls):
        stages = {s.first: s for s in stages_of(settings.schedule, tower.num_patches)}
        warn_if_slower(tower, settings)
    if text_cls is not None:
        text_cls = text_cls.detach()
    tokens, infos = tower.embed(images), []
    for i in range(tower.depth):
        if i in stages:
            tokens, info = reduce_stage(tower, stages[i], tokens, text_cls, settings)
            infos.append(info)
        if cls_only and i == tower.depth - 1:
            tokens = tower.cls_block(i, tokens, tokens[:, 0])[:, None]
        elif tower.checkpointing and tower.model.training:
            tokens = checkpoint(tower.block, i, tokens, use_reentrant=False)
        else:
            tokens = tower.block(i, tokens)
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
