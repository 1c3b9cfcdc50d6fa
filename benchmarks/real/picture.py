"""Draw what the default strategy merges in DINOv2 on two photographs.

    python -m benchmarks.real.picture docs/merged_tokens.jpg [--photographs FILE ..]

Each panel shows a photograph after a layer: the patches of one token have their mean colour and
an outline. Below it is the number of tokens without the CLS token. The photographs in
`photographs/` are from the clothing dataset of Alexey Grigorev, CC0 1.0.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import elip_models
from benchmarks.real import dinov2
from benchmarks.real.dinov2 import batches
from elip_models.analysis.chart_style import write_figure
from elip_models.analysis.merging import merged_image, tokens_of_patches
from elip_models.analysis.visualize import new_figure

LAYERS = (0, 4, 8, dinov2.DEPTH)
PHOTOGRAPHS = sorted((Path(__file__).parent / "photographs").glob("*.jpg"), reverse=True)
SHOWN = 2 * dinov2.PIXELS  # pixels of a panel; the model reads half as many


@torch.no_grad()
def panels(photograph: Path) -> tuple[list[Tensor], list[str]]:
    """Return the pictures (3, S, S) of a photograph after `LAYERS`, and the text below each."""
    model = dinov2.timm_model()
    (images,) = batches([photograph])
    elip_models.reduce_(model)
    with elip_models.record_stages(model) as infos:
        model(images)
    (shown,) = batches([photograph], SHOWN)
    mean, std = (torch.tensor(value)[:, None, None] for value in (dinov2.MEAN, dinov2.STD))
    pixels = (shown[0] * std + mean).clamp(0, 1)
    side = dinov2.PIXELS // dinov2.PATCH
    tokens = [torch.arange(side * side)[None], *tokens_of_patches(infos, side * side)]
    texts = [f"{len(tokens[layer].unique())} tokens" for layer in LAYERS]
    return [merged_image(pixels, tokens[layer].view(side, side)) for layer in LAYERS], texts


def draw(photographs: Sequence[Path], path: Path) -> None:
    """Write a JPEG with one row of panels for each photograph."""
    figure = new_figure(3.0 * len(LAYERS), 3.4 * len(photographs) + 0.3)
    rows = figure.subplots(len(photographs), len(LAYERS), squeeze=False)
    for row, photograph in zip(rows, photographs, strict=True):
        for axis, picture, text in zip(row, *panels(photograph), strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(text, fontsize=21)
    for axis, layer in zip(rows[0], LAYERS, strict=True):
        axis.set_title(f"after layer {layer}" if layer else "patches", fontsize=23)
    write_figure(figure, path, dpi=92, bbox_inches="tight", pil_kwargs={"quality": 72})


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, metavar="OUT.jpg")
    parser.add_argument("--photographs", type=Path, nargs="+", default=PHOTOGRAPHS)
    options = parser.parse_args(arguments)
    draw(options.photographs, options.output)


if __name__ == "__main__":
    main()
