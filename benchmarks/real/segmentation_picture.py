"""Draw the segmentation of a photograph by dense and by reduced features of DINOv2.

    python -m benchmarks.real.segmentation_picture FOLDER docs/segmentation.jpg

FOLDER is that of `benchmarks.real.camvid`, whose linear head of dense features is fitted and reads
both. The photograph, the Summer Palace in Beijing by danielbuechele (CC BY 2.0), comes with
scikit-learn, and no head has seen it.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from matplotlib import colormaps
from rich.progress import Progress
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import elip_models
from benchmarks.real import camvid, dinov2
from elip_models.analysis.chart_style import write_figure
from elip_models.analysis.merging import merged_image, tokens_of_patches
from elip_models.analysis.visualize import new_figure
from elip_models.calibration.linear_probe import LinearProbe

SETTING = "merge:reach=6,decrease=0.5 0.55"
SHOWN = 2  # pixels of the picture for each pixel that the model reads
OPACITY = 0.6


def photograph() -> Tensor:
    """Return the photograph (3, 336, 448) in [0, 1]."""
    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1) / 255
    height, width = camvid.PIXELS
    scale = max(height / pixels.shape[1], width / pixels.shape[2])
    size = [round(scale * side) for side in pixels.shape[1:]]
    resized = TF.resize(pixels, size, TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(resized, [height, width]).clamp(0, 1)


@torch.no_grad()
def mask(model: nn.Module, head: LinearProbe, pixels: Tensor) -> Tensor:
    """Return the class (336, 448) of each pixel of an image (3, 336, 448)."""
    images = TF.normalize(pixels, dinov2.MEAN, dinov2.STD)[None]
    features = camvid.grids(model, images)
    logits = head.logits(features.flatten(2).mT).float().mT.unflatten(2, features.shape[2:])
    return F.interpolate(logits, camvid.PIXELS, mode="bilinear").argmax(1)[0]


def draw(folder: Path, path: Path) -> None:
    """Write a JPEG of the photograph, its tokens, and both masks."""
    pixels = photograph()
    dense, reduced = camvid.read_camvid_settings(SETTING, torch.float32)
    with Progress() as progress:
        advance = partial(progress.advance, progress.add_task("frames", total=None))
        head, _ = camvid.dense_head(dense, folder, advance)
    with elip_models.record_stages(reduced.model) as infos:
        masks = [mask(each.model, head, pixels) for each in (dense, reduced)]
    grid = tuple(side // dinov2.PATCH for side in camvid.PIXELS)
    tokens = tokens_of_patches(infos, grid[0] * grid[1])[-1].view(grid)
    large = F.interpolate(pixels[None], scale_factor=SHOWN, mode="bicubic")[0].clamp(0, 1)
    colors = torch.tensor(colormaps["tab20"].colors, dtype=torch.float32)
    panels = {f"{tokens.numel()} patches": large}
    panels[f"{len(tokens.unique())} tokens after the last block"] = merged_image(large, tokens)
    same = (masks[0] == masks[1]).float().mean().item()
    names = "segmented, dense", f"reduced: {same:.0%} of the pixels equal"
    for name, found in zip(names, masks, strict=True):
        paint = colors[found].permute(2, 0, 1).repeat_interleave(SHOWN, 1)
        panels[name] = large + OPACITY * (paint.repeat_interleave(SHOWN, 2) - large)
    figure = new_figure(9.6, 7.8)
    for axis, (name, picture) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(name, fontsize=15)
    write_figure(figure, path, dpi=92, bbox_inches="tight", pil_kwargs={"quality": 72})


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("output", type=Path, metavar="OUT.jpg")
    options = parser.parse_args(arguments)
    draw(options.folder, options.output)


if __name__ == "__main__":
    main()
