"""Draw what ToMe merges in DINOv2 on one photograph.

    python -m benchmarks.real.picture OUT.png [--photograph FILE] [--layers 6,12]

Each panel shows the photograph after a layer. The patches of one token have their mean colour and
an outline. The default photograph is china.jpg of scikit-learn, by danielbuechele on Flickr,
CC BY 2.0.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import elip_models
from benchmarks.real import dinov2
from benchmarks.real.dinov2 import batches
from elip_models.analysis.chart_style import write_figure
from elip_models.analysis.merging import merged_image, tokens_of_patches
from elip_models.analysis.visualize import new_figure

KEEP, LAYERS = 0.5, "6,12"
SHOWN = 2 * dinov2.PIXELS  # pixels of a panel; the model reads half as many


def default_photograph() -> Path:
    """Return china.jpg of the installed scikit-learn; ImportError names the package."""
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ImportError("the default photograph is in scikit-learn: pip install scikit-learn")
    return Path(found.origin).parent / "datasets" / "images" / "china.jpg"


@torch.no_grad()
def panels(photograph: Path, layers: list[int]) -> dict[str, Tensor]:
    """Return titles and pictures (3, S, S): the photograph, and its tokens after some layers."""
    model = elip_models.reduce_(dinov2.timm_model(), strategy="tome", keep=KEEP)
    (images,) = batches([photograph])
    with elip_models.record_stages(model) as infos:
        model(images)
    (shown,) = batches([photograph], SHOWN)
    mean, std = (torch.tensor(each)[:, None, None] for each in (dinov2.MEAN, dinov2.STD))
    pixels = (shown[0] * std + mean).clamp(0, 1)
    side = dinov2.PIXELS // dinov2.PATCH
    found = {f"photograph:\n{side * side} tokens": pixels}
    tokens = {
        info.stage.first + 1: each[0].view(side, side)
        for info, each in zip(infos, tokens_of_patches(infos, side * side), strict=True)
    }
    for layer in layers:
        if layer not in tokens:
            raise ValueError(f"layers: expected some of 1 to {max(tokens)}, got {layer}")
        count = len(tokens[layer].unique())
        title = f"after layer {layer} of {dinov2.DEPTH}:\n{count} tokens"
        found[title] = merged_image(pixels, tokens[layer])
    return found


def draw(photograph: Path, layers: list[int], path: Path) -> Path:
    """Write the panels side by side as a PNG."""
    found = panels(photograph, layers)
    figure = new_figure(4.0 * len(found), 4.9)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (title, picture) in zip(axes, found.items(), strict=True):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=22)
        axis.set_axis_off()
    write_figure(figure, path, dpi=117, bbox_inches="tight")
    return path


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, metavar="OUT.png")
    parser.add_argument("--photograph", type=Path, default=None)
    parser.add_argument("--layers", default=LAYERS, help=f"layers to show; default: {LAYERS}")
    options = parser.parse_args(arguments)
    layers = [int(layer) for layer in options.layers.split(",")]
    draw(options.photograph or default_photograph(), layers, options.output)


if __name__ == "__main__":
    main()
