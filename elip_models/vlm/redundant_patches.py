"""The removal of redundant patches before the image tower of a multimodal language model.

A forward pre-hook of the tower removes patches from its input. The remaining ones keep their
positions, segments and windows, which the tower takes as arguments. Behind the tower, a removed
unit of patches has a feature of zeros, by which `PromptReduction` finds and removes its token.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elip_models.call_context import put, take
from elip_models.engine.model_methods import keep_handles
from elip_models.vlm.families import Multimodal
from elip_models.vlm.strategies.dedup import Dedup


class RemainingUnits(NamedTuple):
    """(U,) bool, the units that stay in the call of an image tower, if some are removed."""

    stays: Tensor


class PatchReduction:
    """The hooks of an image tower, and the strategy they use."""

    def __init__(self, strategy: Dedup) -> None:
        self.strategy = strategy

    def install(self, multimodal: Multimodal) -> None:
        """Register the hooks."""
        tower = multimodal.tower
        before = tower.register_forward_pre_hook(self.remove, with_kwargs=True)
        after = tower.register_forward_hook(self.restore, with_kwargs=True, always_call=True)
        keep_handles(tower, self, before, after)

    def remove(
        self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Remove patches from what the tower reads."""
        take(RemainingUnits)  # an interrupt may have left one
        if kwargs.get("return_dict") is False:
            raise ValueError(
                "return_dict: expected True for an image tower whose patches 'dedup' removes, got "
                "False; leave it out"
            )
        arguments = dict(zip(("hidden_states", "grid_thw"), args, strict=False)) | kwargs
        patches, grid = arguments["hidden_states"], arguments["grid_thw"]
        stays = remaining_units(self.strategy, patches.detach(), grid, tower.config)
        if stays.all():
            return None
        put(RemainingUnits(stays))
        side = tower.config.spatial_merge_size
        arguments["hidden_states"] = patches[stays.repeat_interleave(side**2)]
        return (), arguments | _remaining_arguments(tower, grid, stays, arguments)

    def restore(self, tower: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Return features of zeros for the removed units; hidden states have none."""
        remaining = take(RemainingUnits)
        if remaining is None or output is None:  # the tower raised an error
            return None
        (stays,) = remaining
        output["pooler_output"] = _scatter(output["pooler_output"], stays)
        if output.get("deepstack_features") is not None:
            output["deepstack_features"] = [
                _scatter(features, stays) for features in output["deepstack_features"]
            ]
        return output


def remaining_units(strategy: Dedup, patches: Tensor, grid: Tensor, config: Any) -> Tensor:
    """Return (U,) bool, the units of images that stay.

    Args:
        strategy: the one that decides.
        patches: (N, C x V) normalised pixels, as the image processor returns them.
        grid: (R, 3) int64, frames, rows and columns of patches of each image or clip.
        config: of the image tower.
    """
    side = config.spatial_merge_size
    units = patches.unflatten(1, (config.in_channels, -1)).unflatten(0, (-1, side**2))
    return strategy.select(units, grid // grid.new_tensor([1, side, side]))


def _scatter(features: Tensor, stays: Tensor) -> Tensor:
    """Return (U, D) of the features (K, D) of the units that stay."""
    whole = features.new_zeros(len(stays), features.shape[1])
    return whole.index_put((stays.nonzero()[:, 0].to(features.device),), features)


def _remaining_arguments(
    tower: nn.Module, grid: Tensor, stays: Tensor, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a tower that it makes from the grid, for the remaining patches.

    Args:
        tower: the image tower.
        grid: (R, 3) frames, rows and columns of patches.
        stays: (U,) bool, the units that stay.
        arguments: those of the call, which may have some for all patches already.
    """
    from transformers import vision_utils as vision

    config, side = tower.config, tower.config.spatial_merge_size
    patches = stays.repeat_interleave(side**2)
    positions = vision.get_vision_position_ids(grid, side, kwargs=arguments)
    ends = vision.get_vision_cu_seqlens(grid, kwargs=arguments)
    new = {"position_ids": positions[patches], "cu_seqlens": remaining_ends(ends, patches)}
    if getattr(config, "window_size", None) is not None:
        order, ends = vision.get_vision_window_index(
            grid, side, config.window_size, config.patch_size, kwargs=arguments
        )
        windows = RemainingWindows.of(order.to(stays.device), ends, stays, side**2)
        new |= {"window_index": windows.order, "cu_window_seqlens": windows.ends}
    if getattr(config, "num_position_embeddings", None) is not None:
        indices, weights = vision.get_vision_interpolation_indices_and_weights(
            grid,
            tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=side,
            kwargs=arguments,
        )
        new |= {"interp_indices": indices[patches], "interp_weights": weights[patches]}
    return new


class RemainingWindows(NamedTuple):
    """The windows of attention that remain.

    order: (K,) int64, the remaining units, numbered without the others, window by window.
    ends: where the windows end, int32, in remaining patches, with 0 before the first one.
    patches: (N,) bool, the patches that stay, in the order of the windows of the whole image.
    """

    order: Tensor
    ends: Tensor
    patches: Tensor

    @classmethod
    def of(cls, order: Tensor, ends: Tensor, stays: Tensor, size: int) -> Self:
        """Return the remaining part of windows.

        Args:
            order: (U,) int64, all units, window by window.
            ends: where the windows end in all patches.
            stays: (U,) bool, the units that stay.
            size: the patches of a unit.
        """
        ordered = stays[order]
        patches = ordered.repeat_interleave(size)
        ends = remaining_ends(ends, patches).unique_consecutive()
        return cls((stays.cumsum(0) - 1)[order[ordered]], ends, patches)


def remaining_ends(ends: Tensor, stays: Tensor) -> Tensor:
    """Return where segments of patches end, int32, if the patches `stays` (N,) bool remain."""
    return F.pad(stays.cumsum(0), (1, 0))[ends.to(stays.device, torch.int64)].to(torch.int32)
