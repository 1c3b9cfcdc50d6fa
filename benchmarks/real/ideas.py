"""What ideas beyond the library's strategies keep of DINOv2's accuracy and recall.

    python -m benchmarks.real.ideas FOLDER --output X.json

Each idea is a forward pass of DINOv2 with other settings than the strategies have, or with theirs,
so that they are compared by one program. A probe is fitted on two thirds of the training split of
the clothes, and applied to the rest of it and the validation split; recall is that of the dev split
of Flickr8k. The test splits are not read. Features are stored in FOLDER/features, so a run that was
stopped continues. `materials.py` says what FOLDER holds.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import elip_kernels
from benchmarks.real import dinov2, materials
from benchmarks.real.dinov2 import DEPTH, PATCH, PIXELS, batches
from benchmarks.real.features import stored
from benchmarks.real.measures import RetrievalMaps, knn_correct
from benchmarks.real.tasks import KNN, TOP1, means, measured_on
from elip_models.analysis.feature_measures import cosine
from elip_models.analysis.probe import Probe
from elip_models.saving.files import write_json
from elip_models.validation import check_output

HEADS, PATCHES = 6, (PIXELS // PATCH) ** 2


class Idea(NamedTuple):
    """The settings of a forward pass.

    pixels: the side of the image that the tower reads.
    coarse: how many areas of 2 x 2 patches become one patch of half the resolution: those that lose
        the least detail.
    flops: the share of the dense FLOPs that merges in the blocks reach. None: no merges.
    weights: how many tokens each block merges, relative to the others.
    class_token_only: the last block computes the class token alone.
    image_sizes: the patches of a smaller image begin with the size that makes their sum that of the
        dense model's patches.
    temperature: scale attention scores by log(dense tokens) / log(tokens).
    """

    pixels: int = PIXELS
    coarse: int = 0
    flops: float | None = None
    weights: tuple[float, ...] = (1.0,) * DEPTH
    class_token_only: bool = False
    image_sizes: bool = False
    temperature: bool = False

    @property
    def patches(self) -> int:
        """Return the number of patches that enter block 0."""
        return (self.pixels // PATCH) ** 2 - 3 * self.coarse

    def merges(self, width: int) -> list[int]:
        """Return how many tokens each block merges away, to reach the share of the FLOPs."""
        if self.flops is None:
            return [0] * DEPTH
        weights = [*self.weights[:-1], 0.0] if self.class_token_only else [*self.weights]
        low, high = 0.0, 2.0 * self.patches
        for _ in range(60):
            middle = (low + high) / 2
            merges = _spread(weights, middle)
            if self.relative_flops(merges, width) > self.flops:
                low = middle
            else:
                high = middle
        return merges

    def relative_flops(self, merges: Sequence[int], width: int) -> float:
        """Return the FLOPs relative to dense."""
        flops, tokens = self.patches * 3 * PATCH**2 * width, self.patches + 1
        for i, count in enumerate(merges):
            left = tokens - min(count, (tokens - 1) // 2)
            if self.class_token_only and i == DEPTH - 1:
                flops += 2 * tokens * width**2 + 10 * width**2 + 2 * tokens * width
            else:
                flops += 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * left * width**2
            tokens = left
        dense = PATCHES + 1
        block = 12 * dense * width**2 + 2 * dense**2 * width
        return flops / (PATCHES * 3 * PATCH**2 * width + DEPTH * block)


def _spread(weights: Sequence[float], total: float) -> list[int]:
    """Return whole numbers in the proportions of `weights` whose sum is near `total`."""
    shares = accumulate(weight / sum(weights) for weight in weights)
    bounds = [0, *(round(share * total) for share in shares)]
    return [b - a for a, b in pairwise(bounds)]


def _linear(first: float, last: float) -> tuple[float, ...]:
    """Return weights that fall linearly over the blocks."""
    return tuple(first + (last - first) * i / (DEPTH - 1) for i in range(DEPTH))


DECREASING = _linear(18, 7)
HALF = partial(Idea, pixels=182, flops=0.42, class_token_only=True)
IDEAS = {
    "merge, 0.69": Idea(flops=0.69),
    "merge, decreasing 18:7, 0.69": Idea(flops=0.69, weights=DECREASING),
    "merge, 0.49": Idea(flops=0.49),
    "merge, decreasing 18:7, 0.49": Idea(flops=0.49, weights=DECREASING),
    "merge, 0.35": Idea(flops=0.35),
    "merge, decreasing 18:7, 0.35": Idea(flops=0.35, weights=DECREASING),
    "154 px": Idea(154),
    "154 px, sizes of patches": Idea(154, image_sizes=True),
    "154 px, temperature of attention": Idea(154, temperature=True),
    "154 px, merge, 0.35": Idea(154, flops=0.35),
    "182 px, merge, 0.49": Idea(182, flops=0.49),
    "182 px, merge, 0.42": HALF(),
    "182 px, merge, decreasing 18:7, 0.42": HALF(weights=DECREASING),
    "182 px, merge, decreasing 12:1, 0.42": HALF(weights=_linear(12, 1)),
    "182 px, merge in the first six blocks, 0.42": HALF(weights=(1.0,) * 6 + (0.0,) * 6),
    "182 px, merge, decreasing 18:7, 0.35": HALF(weights=DECREASING, flops=0.35),
    "196 px, merge, decreasing 18:7, 0.42": HALF(pixels=196, weights=DECREASING),
    "154 px, merge, decreasing 18:7, 0.25": HALF(pixels=154, weights=DECREASING, flops=0.25),
    "smooth areas at half resolution": Idea(coarse=45),
}


@torch.no_grad()
def forward(model: nn.Module, images: Tensor, idea: Idea) -> Tensor:
    """Return the class-token features (B, D) of images (B, 3, 224, 224)."""
    x = _embed(model, images, idea)
    merges, sizes = idea.merges(x.shape[2]), None
    if idea.image_sizes:
        sizes = torch.ones(x.shape[:2])
        sizes[:, 1:] = PATCHES / idea.patches
    for i, block in enumerate(model.blocks):
        B, N, D = x.shape
        q, k, v = block.attn.qkv(block.norm1(x)).view(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if idea.class_token_only and i == DEPTH - 1:
            q, x = q[:, :, :1], x[:, :1]
        bias = None if sizes is None else sizes.log()[:, None, None]
        scale = (D // HEADS) ** -0.5
        if idea.temperature:
            scale *= math.log(PATCHES + 1) / math.log(N)
        attended = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
        x = x + block.ls1(block.attn.proj(attended.transpose(1, 2).flatten(2)))
        count = min(merges[i], (N - 1) // 2)
        if count and x.shape[1] > 1:
            x, sizes = _merged(x, count, sizes)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x[:, 0])


def _embed(model: nn.Module, images: Tensor, idea: Idea) -> Tensor:
    """Return the tokens (B, N, D) that enter block 0."""
    side = idea.pixels // PATCH
    if idea.pixels != PIXELS:
        images = F.interpolate(images, (idea.pixels,) * 2, mode="bicubic", antialias=True)
    positions = model.pos_embed
    if idea.pixels != PIXELS:
        positions = resample_abs_pos_embed(positions, (side, side), num_prefix_tokens=1)
    patches = model.patch_embed.proj(images).flatten(2).mT + positions[:, 1:]
    cls = (model.cls_token + positions[:, :1]).expand(len(images), -1, -1)
    if idea.coarse:
        patches = _mixed(model, images, patches, positions, idea.coarse)
    return torch.cat([cls, patches], dim=1)


def _mixed(
    model: nn.Module, images: Tensor, patches: Tensor, positions: Tensor, coarse: int
) -> Tensor:
    """Return patches (B, n, D) of areas of 2 x 2: four where there is detail, else one, last."""
    B, D, half = len(images), patches.shape[2], images.shape[2] // PATCH // 2
    small = F.interpolate(images, (half * PATCH,) * 2, mode="bicubic", antialias=True)
    lost = images - F.interpolate(small, images.shape[2:], mode="bicubic")
    detail = F.avg_pool2d(lost.square().mean(1, keepdim=True), 2 * PATCH).flatten(1)
    grid = positions[:, 1:].mT.unflatten(2, (2 * half, 2 * half))
    merged = model.patch_embed.proj(small).flatten(2).mT + F.avg_pool2d(grid, 2).flatten(2).mT
    four = patches.view(B, half, 2, half, 2, D).transpose(2, 3).reshape(B, half * half, 4, D)
    order = detail.argsort(1, descending=True)
    fine, smooth = order[:, : half * half - coarse].sort(1)[0], order[:, -coarse:].sort(1)[0]
    return torch.cat(
        [
            four.gather(1, fine[..., None, None].expand(-1, -1, 4, D)).flatten(1, 2),
            merged.gather(1, smooth[..., None].expand(-1, -1, D)),
        ],
        dim=1,
    )


def _merged(x: Tensor, count: int, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge `count` tokens of x (B, N, D) as `TokenMerging`; return the tokens and their sizes."""
    merged, sizes, match = elip_kernels.bipartite_merge(
        x, x, count, size=sizes, num_prefix_tokens=1, return_info=True
    )
    largest = merged.new_zeros(merged.shape[:2])
    largest = largest.scatter_reduce(1, match.slots.long(), x.norm(dim=2), "amax")
    return merged * (largest / merged.norm(dim=2))[..., None], sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.ideas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the materials, see benchmarks/real/materials.py")
    parser.add_argument("--output", type=Path, required=True, metavar="X.json", help="the results")
    options = parser.parse_args(arguments)
    try:
        check_output("--output", options.output)
        write_json(options.output, measure(options.folder, Console()))
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def measure(folder: Path, console: Console) -> dict[str, Any]:
    """Return what each idea loses against dense, in shares, paired by photograph."""
    model = dinov2.timm_model()
    train, validation = (materials.clothes(folder, split) for split in ("train", "validation"))
    dev, captioned = materials.flickr8k(folder, "dev"), materials.flickr8k(folder, "train")
    held = torch.arange(len(train.labels)) % 3 == 0
    clothes = [path for path, is_held in zip(train.paths, held, strict=True) if is_held]
    paths = {"clothes": clothes + validation.paths, "flickr8k": dev.paths}
    labels = torch.cat([train.labels[held], validation.labels])

    def features(name: str, idea: Idea, files: Sequence[Path]) -> Tensor:
        def compute() -> Tensor:
            return torch.cat([forward(model, images, idea) for images in batches(files)])

        return stored(folder / "features", ["idea", name, str(idea), *map(str, files)], compute)

    def texts(captions: list[str]) -> Tensor:
        compute = partial(materials.text_features, captions, folder / "all-MiniLM-L6-v2")
        return stored(folder / "features", ["all-MiniLM-L6-v2", *captions], compute)

    dense = {kind: features("dense", Idea(), files) for kind, files in paths.items()}
    fitted, fitted_labels = features("dense", Idea(), train.paths)[~held], train.labels[~held]
    probe = Probe.fit(fitted, fitted_labels)
    maps = RetrievalMaps.fit(features("dense", Idea(), captioned.paths), texts(captioned.captions))
    dev_texts = texts(dev.captions)

    def values(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            TOP1: probe.correct(found["clothes"], labels),
            KNN: knn_correct(found["clothes"], labels, fitted, fitted_labels),
            **maps.recalls(found["flickr8k"], dev_texts),
        }

    whole, rows = values(dense), []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for name, idea in progress.track(IDEAS.items(), description="ideas"):
            found = {kind: features(name, idea, files) for kind, files in paths.items()}
            reduced = values(found)
            width = dense["clothes"].shape[1]
            rows.append(
                {
                    "idea": name,
                    "flops": round(idea.relative_flops(idea.merges(width), width), 4),
                    "difference": means({task: reduced[task] - whole[task] for task in whole}),
                    **means({"cosine": cosine(dense["flickr8k"], found["flickr8k"])}),
                }
            )
    photographs = {kind: len(files) for kind, files in paths.items()}
    return {
        **measured_on(),
        "photographs": {"fitted": len(fitted), **photographs},
        "dense": means(whole),
        "ideas": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
