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
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
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
CALIBRATION = 20
"""Photographs of each kind that set the thresholds of an adaptive idea."""


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
    adaptive: each image merges its own number of tokens in a block: pairs at least as similar as a
        threshold, at which the mean over training photographs is that of `merges`.
    protect: subtract this many times the class token's attention on a token, relative to its mean,
        from the token's similarity, so that what the class token reads is merged late.
    """

    pixels: int = PIXELS
    coarse: int = 0
    flops: float | None = None
    weights: tuple[float, ...] = (1.0,) * DEPTH
    class_token_only: bool = False
    image_sizes: bool = False
    temperature: bool = False
    adaptive: bool = False
    protect: float = 0.0

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
    "merge, numbers by image, 0.49": Idea(flops=0.49, adaptive=True),
    "182 px, merge, numbers by image, 0.42": HALF(adaptive=True),
    "182 px, merge, class token's tokens late (0.02), 0.42": HALF(protect=0.02),
    "182 px, merge, class token's tokens late (0.1), 0.42": HALF(protect=0.1),
}


@torch.no_grad()
def forward(
    model: nn.Module, images: Tensor, idea: Idea, thresholds: Sequence[float] = ()
) -> Tensor:
    """Return the class-token features (B, D) of images (B, 3, 224, 224).

    With the `thresholds` of each block, the images of an adaptive idea are computed one by one.
    """
    if idea.adaptive:
        features = [_adaptive(model, image[None], idea, thresholds)[0] for image in images]
        return torch.cat(features)
    x = _embed(model, images, idea)
    merges, sizes = idea.merges(x.shape[2]), None
    if idea.image_sizes:
        sizes = torch.ones(x.shape[:2])
        sizes[:, 1:] = PATCHES / idea.patches
    for i, count in enumerate(merges):
        x, penalty = _attended(model, x, sizes, idea, i)
        count = min(count, (x.shape[1] - 1) // 2)
        x, sizes = _finished(model.blocks[i], x, count, sizes, penalty)
    return model.norm(x[:, 0])


def _attended(
    model: nn.Module, x: Tensor, sizes: Tensor | None, idea: Idea, index: int
) -> tuple[Tensor, Tensor | None]:
    """Return the tokens after the attention of a block, and the penalty (B, N) of protection."""
    block, (B, N, D) = model.blocks[index], x.shape
    q, k, v = block.attn.qkv(block.norm1(x)).view(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    if idea.class_token_only and index == DEPTH - 1:
        q, x = q[:, :, :1], x[:, :1]
    bias = None if sizes is None else sizes.log()[:, None, None]
    scale = (D // HEADS) ** -0.5
    if idea.temperature:
        scale *= math.log(PATCHES + 1) / math.log(N)
    penalty = None
    if idea.protect:
        scores = scale * q[:, :, :1] @ k.mT
        row = (scores if bias is None else scores + bias).softmax(-1).mean(1)[:, 0]
        penalty = idea.protect * row / row[:, 1:].mean(1, keepdim=True)
    attended = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    return x + block.ls1(block.attn.proj(attended.transpose(1, 2).flatten(2))), penalty


def _finished(
    block: nn.Module, x: Tensor, count: int, sizes: Tensor | None, penalty: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Merge `count` tokens and run the MLP of a block; return the tokens and their sizes."""
    if count and x.shape[1] > 1:
        x, sizes = _merged(x, count, sizes, penalty)
    return x + block.ls2(block.mlp(block.norm2(x))), sizes


def _adaptive(
    model: nn.Module, image: Tensor, idea: Idea, thresholds: Sequence[float]
) -> tuple[Tensor, list[int]]:
    """Return the features (1, D) of one image, and how many tokens each block merged."""
    x, sizes, merges = _embed(model, image, idea), None, []
    for i, threshold in enumerate(thresholds):
        x, _ = _attended(model, x, sizes, idea, i)
        merges.append(min(int((_similarities(x) >= threshold).sum()), (x.shape[1] - 1) // 2))
        x, sizes = _finished(model.blocks[i], x, merges[-1], sizes)
    return model.norm(x[:, 0]), merges


def _similarities(x: Tensor) -> Tensor:
    """Return the similarity of each token of x (1, N, D) that may be merged to its partner."""
    unit = F.normalize(x[0], dim=1)
    if len(unit) < 3:
        return x.new_zeros(0)
    return (unit[2::2] @ unit[1::2].T).amax(1)


@torch.no_grad()
def mean_flops(
    model: nn.Module, idea: Idea, thresholds: Sequence[float], paths: Sequence[Path]
) -> float:
    """Return the FLOPs relative to dense; of an adaptive idea, the mean over photographs."""
    width = model.embed_dim
    if not idea.adaptive:
        return idea.relative_flops(idea.merges(width), width)
    merges = merged_counts(model, torch.cat([*batches(paths)]), idea, thresholds)
    return fmean(idea.relative_flops(counts, width) for counts in merges)


@torch.no_grad()
def merged_counts(
    model: nn.Module, images: Tensor, idea: Idea, thresholds: Sequence[float]
) -> list[list[int]]:
    """Return how many tokens each block merges of each image, for an adaptive idea."""
    return [_adaptive(model, image[None], idea, thresholds)[1] for image in images]


@torch.no_grad()
def calibrated(model: nn.Module, images: Tensor, idea: Idea) -> list[float]:
    """Return thresholds at which each block merges `idea.merges` tokens of an image on average."""
    states: list[tuple[Tensor, Tensor | None]] = [
        (_embed(model, image[None], idea), None) for image in images
    ]
    thresholds = []
    for i, count in enumerate(idea.merges(states[0][0].shape[2])):
        attended = [(_attended(model, x, sizes, idea, i)[0], sizes) for x, sizes in states]
        similarities = torch.cat([_similarities(x) for x, _ in attended]).sort(descending=True)[0]
        total = min(count * len(images), len(similarities))
        thresholds.append(float(similarities[total - 1]) if total else math.inf)
        states = [
            _finished(model.blocks[i], x, int((_similarities(x) >= thresholds[-1]).sum()), sizes)
            for x, sizes in attended
        ]
    return thresholds


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


def _merged(
    x: Tensor, count: int, sizes: Tensor | None, penalty: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Merge `count` tokens of x (B, N, D) as `TokenMerging`; return the tokens and their sizes."""
    merged, sizes, match = elip_kernels.bipartite_merge(
        x, x, count, size=sizes, penalty=penalty, num_prefix_tokens=1, return_info=True
    )
    largest = merged.new_zeros(merged.shape[:2])
    largest = largest.scatter_reduce(1, match.slots.long(), x.norm(dim=2), "amax")
    return merged * (largest / merged.norm(dim=2))[..., None], sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_measurement(measure, "benchmarks.real.ideas", __doc__, arguments)


def run_measurement(
    measure: Callable[[Path], dict[str, Any]],
    command: str,
    description: str,
    arguments: Sequence[str] | None,
) -> int:
    """Run a command that measures with a folder of materials; return the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the materials, see benchmarks/real/materials.py")
    parser.add_argument("--output", type=Path, required=True, metavar="X.json", help="the results")
    options = parser.parse_args(arguments)
    try:
        check_output("--output", options.output)
        write_json(options.output, measure(options.folder))
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def measure(folder: Path) -> dict[str, Any]:
    """Return what each idea loses against dense, in shares, paired by photograph."""
    model = dinov2.timm_model()
    train, validation = (materials.clothes(folder, split) for split in ("train", "validation"))
    dev = materials.flickr8k(folder, "dev")
    held = torch.arange(len(train.labels)) % 3 == 0
    clothes, fitted_paths = (
        [path for path, is_held in zip(train.paths, held, strict=True) if is_held == kind]
        for kind in (True, False)
    )
    paths = {"clothes": clothes + validation.paths, "flickr8k": dev.paths}
    labels = torch.cat([train.labels[held], validation.labels])

    captioned = materials.flickr8k(folder, "train")
    samples = [*spread_out(fitted_paths), *spread_out(captioned.paths)]

    def thresholds_of(idea: Idea) -> list[float]:
        return calibrated(model, torch.cat([*batches(samples)]), idea) if idea.adaptive else []

    def features(name: str, idea: Idea, files: Sequence[Path]) -> Tensor:
        def compute() -> Tensor:
            limits = thresholds_of(idea)
            return torch.cat([forward(model, images, idea, limits) for images in batches(files)])

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
    console = Console()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for name, idea in progress.track(IDEAS.items(), description="ideas"):
            found = {kind: features(name, idea, files) for kind, files in paths.items()}
            reduced = values(found)
            some = [path for files in paths.values() for path in spread_out(files)]
            rows.append(
                {
                    "idea": name,
                    "flops": round(mean_flops(model, idea, thresholds_of(idea), some), 4),
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


def spread_out(paths: Sequence[Path], count: int = CALIBRATION) -> Sequence[Path]:
    """Return `count` paths at equal distances."""
    return paths[:: max(len(paths) // count, 1)][:count]


if __name__ == "__main__":
    sys.exit(main())
