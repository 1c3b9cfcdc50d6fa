"""encode_image: run a tower's blocks in order, reduced by a strategy."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elip_models.call_context import records_of
from elip_models.engine.forward_state import ForwardState
from elip_models.engine.install import is_reduced_tower, strategy_by_default
from elip_models.strategies.elip import check_text
from elip_models.strategies.schedule import Schedule
from elip_models.strategies.spec import StrategyOptions, resolve_strategy
from elip_models.strategies.strategy import StageInfo, Strategy
from elip_models.towers import Tower, as_tower, check_module, in_forward
from elip_models.user_warnings import UnguidedWarning, warn_once


@overload
def encode_image(
    model: nn.Module, images: Tensor, text_cls: Tensor | None = ..., *, keep: float | None = ...,
    schedule: Schedule | str | None = ..., strategy: str | Strategy | None = ...,
    return_info: Literal[False] = ..., **options: Unpack[StrategyOptions],
) -> Tensor: ...  # fmt: skip
@overload
def encode_image(
    model: nn.Module, images: Tensor, text_cls: Tensor | None = ..., *, keep: float | None = ...,
    schedule: Schedule | str | None = ..., strategy: str | Strategy | None = ...,
    return_info: Literal[True], **options: Unpack[StrategyOptions],
) -> tuple[Tensor, list[StageInfo]]: ...  # fmt: skip
@overload
def encode_image(
    model: nn.Module, images: Tensor, text_cls: Tensor | None = ..., *, keep: float | None = ...,
    schedule: Schedule | str | None = ..., strategy: str | Strategy | None = ...,
    return_info: bool, **options: Unpack[StrategyOptions],
) -> Tensor | tuple[Tensor, list[StageInfo]]: ...  # fmt: skip
def encode_image(
    model: nn.Module,
    images: Tensor,
    text_cls: Tensor | None = None,
    *,
    keep: float | None = None,
    schedule: Schedule | str | None = None,
    strategy: str | Strategy | None = None,
    return_info: bool = False,
    **options: Unpack[StrategyOptions],
) -> Tensor | tuple[Tensor, list[StageInfo]]:
    """Run an image model with token reduction and return its tokens.

        tokens = encode_image(model, images, text_cls, strategy="elip", scorer="exact")

    Args:
        model: an image model that a tower of `elip_models.towers` reads, for example from timm.
        images: (B, 3, H, W), or clips (B, frames, 3, H, W) of a video model, normalised as the
            model expects.
        text_cls: (B, D), one vector per image in the tower's width D, such as the CLS output of a
            text encoder. It is detached. A row of zeros means no text: the image alone selects.
            Only guided strategies read it.
        keep: the target, the mean share of tokens over the layers, as of `reduce_`.
        schedule: stages as text, as of `reduce_`; without `strategy` it selects ELIP.
        strategy: a name, a line of text or an instance, with the default of `reduce_`.
        return_info: also return a `StageInfo` for every stage.
        options: options of the strategy, as of `reduce_`. The paper uses ELIP with scorer='exact'
            and without_text='dense'.

    Returns:
        Tokens (B, M, D) after the tower's final norm, before pooling. For ELIP, M = K+2: the CLS
        token, K kept patches and the merged token. With return_info, also the list of `StageInfo`.

    Raises:
        TypeError: the model cannot be reduced, with the reason, or a wrong type.
        ValueError: a wrong value, or a model that `reduce_` has already changed.
    """
    check_module(model, images, "encode_image")
    tower, options = as_tower(model), {"schedule": schedule, **options}
    strategy = _resolve(tower, strategy, options, keep, has_text=text_cls is not None)
    if not isinstance(return_info, bool):
        raise TypeError(f"return_info: expected True or False, got {return_info!r}")
    _check_images(images, tower)
    if text_cls is not None:
        check_text(text_cls, (images.shape[0], tower.width), images.device)
    tokens, infos = run_tower(tower, images, text_cls, strategy)
    return (tokens, infos) if return_info else tokens


def _resolve(
    tower: Tower,
    strategy: str | Strategy | None,
    options: dict[str, Any],
    keep: float | None,
    *,
    has_text: bool,
) -> Strategy:
    """Return the strategy for the tower; warn once if the default one ignores the text."""

    def default() -> Strategy:
        chosen = strategy_by_default(tower, has_text=has_text, use_config=keep is None)
        if has_text and not chosen.is_guided:
            warn_once(
                f"text_cls is ignored: {chosen.name!r}, the default strategy, reads no text; pass "
                "strategy='elip' to be guided by it",
                UnguidedWarning,
                stacklevel=6,
            )
        return chosen

    return resolve_strategy(tower, strategy, options, keep=keep, default=default)


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
    """Run `encode_image` with checked arguments; return the tokens and a `StageInfo` per step.

    With `cls_only` the caller reads token 0 alone. Without gradient and without hooks on the last
    block, that block then computes this token only: the tokens are (B, 1, D). `replays` are results
    of another tower on the same images, to reproduce.
    """
    if is_reduced_tower(tower):
        raise ValueError(
            "model: expected one that reduce_ has not changed, since it would reduce twice, got a "
            "reduced one; call the model itself, or unreduce_ it first"
        )
    recorded, last = tower, tower.depth - 1
    cls_only = cls_only and not torch.is_grad_enabled() and tower.is_plain(last)
    text_cls = None if text_cls is None else text_cls.detach()
    images = strategy.resize(tower, images)
    tokens = strategy.embed(tower, images)
    tower = tower.resized_for(images)
    if not torch.compiler.is_compiling():
        tower = tower.changed(blocks=tuple(tower.blocks))  # faster to index than a ModuleList
    forward = ForwardState(tower, strategy, text_cls, num_tokens=tokens.shape[1], replays=replays)
    run = forward.run_block
    if tower.checkpointing and tower.model.training:
        run = partial(checkpoint, forward.run_block, use_reentrant=False)
    for i in range(tower.depth):
        tokens, info = run(i, tokens, cls_only=cls_only and i == last)
        if info is not None:
            forward.add(i, info)
    infos = list(forward.infos.values())
    if not torch.compiler.is_compiling():  # a graph cannot read a context variable
        for record in records_of(recorded):
            record += infos
    return tower.finish(tokens), infos


def _check_images(images: Tensor, tower: Tower) -> None:
    """Raise TypeError or ValueError unless the images have the tower's size, dtype and device."""
    weight = next(tower.model.parameters())
    size = "H, W" if tower.has_dynamic_size else "{}, {}".format(*tower.image_size)
    size = f"{tower.num_frames}, 3, {size}" if tower.num_frames > 1 else f"3, {size}"
    expected = f"a floating-point tensor (B, {size})"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected {expected}, got {got}; scale pixels to floats first")
    fits = tower.has_dynamic_size or tuple(images.shape[2:]) == tower.image_size
    if images.dim() != (5 if tower.num_frames > 1 else 4) or not fits:
        raise ValueError(
            f"images: expected {expected}, got {tuple(images.shape)}; {tower.size_advice}"
        )
    if images.device != weight.device:
        raise ValueError(f"images: expected them on {weight.device}, got {images.device}")
