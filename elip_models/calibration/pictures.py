"""The picture of what a setting merges in an image of a task."""

import io

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from elip_models.analysis.merging import merged_image, tokens_of_patches
from elip_models.analysis.visualize import grid_shape
from elip_models.api import record_stages, strategies_in
from elip_models.calibration.images import ImageTask
from elip_models.calibration.task import Task
from elip_models.images import IMAGENET_STATS
from elip_models.towers import as_reducible, as_tower


@torch.no_grad()
def merged_picture(task: Task, model: nn.Module, image: int) -> bytes:
    """Return a PNG of an image in which the patches of one token have their mean colour.

    Blocks that drop all patches, since only the class token is used, are not shown. A setting that
    merges nothing, such as a smaller image, has the image as the model reads it. There is no
    picture, b"", if the model does not read one image at a time.
    """
    if not isinstance(task, ImageTask):
        return b""
    tower = as_tower(as_reducible(model).image_model)
    pixels = task.pixels(model, [image])
    with record_stages(model) as infos:
        task.forward(model, pixels)
    (strategy,) = strategies_in(model)
    smaller = strategy.resize(tower, pixels)
    mean, std = (
        torch.tensor(stat)[:, None, None] for stat in tower.image_stats() or IMAGENET_STATS
    )
    shown: Tensor = (smaller[0].float().cpu() * std + mean).clamp(0, 1)
    if infos:
        num_patches = infos[0].reduction.source_map().shape[-1] - tower.num_prefix_tokens
        steps = (tokens[0].cpu() for tokens in reversed(tokens_of_patches(infos, num_patches)))
        tokens = next(tokens for tokens in steps if (tokens >= 0).any())
        shown = merged_image(shown, tokens.view(grid_shape(num_patches, tuple(shown.shape[1:]))))
    file = io.BytesIO()
    to_pil_image(shown).save(file, "PNG")
    return file.getvalue()
