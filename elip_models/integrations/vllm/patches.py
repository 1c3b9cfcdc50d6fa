"""The patches of an image or a clip that stay, and what vLLM's image tower needs for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elip_models.vlm.redundant_patches import RemainingWindows, remaining_ends

OF_PATCHES = ("pos_embeds", "rotary_pos_emb_cos", "rotary_pos_emb_sin")
"""The arguments of towers with a row for each patch."""


def normalised(
    patches: Tensor, mean: Sequence[float], std: Sequence[float], scale: float
) -> Tensor:
    """Return patches (N, C x V) of raw pixels as the image processor normalises them.

    Args:
        patches: from 0 to 255.
        mean: of each channel.
        std: of each channel.
        scale: the factor of pixels before they are normalised.
    """
    middle, spread = (torch.tensor(values)[:, None] * (1 / scale) for values in (mean, std))
    return ((patches.unflatten(1, (len(mean), -1)).float() - middle) / spread).flatten(1)


def units_of_items(stays: Tensor, grid: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return the part of a mask of units (U,) that belongs to each image or clip.

    Args:
        stays: (U,) bool, the units that stay.
        grid: (R, 3) int64, frames, rows and columns of patches.
        size: the patches of a unit.
    """
    return stays.split((grid.prod(-1) // size).tolist())


def remaining_metadata(metadata: Mapping[str, Any], stays: Tensor, size: int) -> dict[str, Any]:
    """Return the metadata of vLLM's image tower for the patches that remain.

    Args:
        metadata: what `prepare_encoder_metadata` returns for all patches.
        stays: (U,) bool, the units that stay, on the CPU.
        size: the patches of a unit.
    """
    new, device = dict(metadata), metadata["cu_seqlens"].device
    patches = stays.repeat_interleave(size)
    ends = {"": remaining_ends(metadata["cu_seqlens"], patches)}
    if "window_index" in metadata:
        order = metadata["window_index"].cpu()
        windows = RemainingWindows.of(order, metadata["cu_window_seqlens"], stays, size)
        patches, ends = windows.patches, {"_full": ends[""], "_window": windows.ends}
        new["cu_window_seqlens"] = windows.ends.to(device)
        new["window_index"] = windows.order.to(device)
        new["reverse_indices"] = windows.order.argsort().to(device)
    new["cu_seqlens"] = next(iter(ends.values())).to(device)
    for name, each in ends.items():
        new[f"max_seqlen{name}"] = each.diff().max()
    rows = patches.nonzero()[:, 0].to(device)
    return new | {name: metadata[name][rows] for name in OF_PATCHES if name in metadata}
