"""What adaptive numbers of merges cost in batches, whose images are padded to the longest.

    python -m benchmarks.real.adaptive_batches FOLDER --output X.json

For the adaptive ideas of `ideas.py`: FLOPs relative to dense of single images, of batches in the
order of the data, and of batches of similar lengths, which needs all lengths in advance.
Photographs are those of the validation split of the clothes and of Flickr8k's dev split.
"""

import sys
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.real import dinov2, materials
from benchmarks.real.dinov2 import batches
from benchmarks.real.ideas import (
    IDEAS,
    Idea,
    calibrated,
    merged_counts,
    run_measurement,
    spread_out,
)
from benchmarks.real.tasks import measured_on

PHOTOGRAPHS = 160
"""Of each kind."""
SIZES = (1, 8, 32)


def batch_flops(idea: Idea, merges: Sequence[Sequence[int]], size: int, width: int) -> float:
    """Return the mean FLOPs of batches of `size`, padded to the longest image in each block."""
    lengths = [[*accumulate(counts, int.__sub__, initial=idea.patches + 1)] for counts in merges]
    groups = [lengths[i : i + size] for i in range(0, len(lengths) - size + 1, size)]
    longest = [[max(block) for block in zip(*group, strict=True)] for group in groups]
    counts = [[before - after for before, after in pairwise(each)] for each in longest]
    return fmean(idea.relative_flops(each, width) for each in counts)


def measure(folder: Path) -> dict[str, Any]:
    """Return FLOPs of batches in the order of the data and of similar lengths, by idea and size."""
    model = dinov2.timm_model()
    fitted = [split(folder, "train").paths for split in (materials.clothes, materials.flickr8k)]
    samples = torch.cat([*batches([path for paths in fitted for path in spread_out(paths)])])
    splits = {
        "clothes": materials.clothes(folder, "validation").paths,
        "flickr8k": materials.flickr8k(folder, "dev").paths,
    }
    images = {
        kind: torch.cat([*batches(spread_out(paths, PHOTOGRAPHS))])
        for kind, paths in splits.items()
    }
    rows = []
    for name, idea in IDEAS.items():
        if not idea.adaptive:
            continue
        thresholds = calibrated(model, samples, idea)
        for kind, photographs in images.items():
            merges = merged_counts(model, photographs, idea, thresholds)
            by_length = sorted(merges, key=lambda each: idea.relative_flops(each, model.embed_dim))
            orders = {"data": merges, "length": by_length}
            flops = {
                order: [round(batch_flops(idea, each, B, model.embed_dim), 4) for B in SIZES]
                for order, each in orders.items()
            }
            rows.append({"idea": name, "photographs": kind, "flops": flops})
    counts = {kind: len(each) for kind, each in images.items()}
    return {**measured_on(), "photographs": counts, "batch_sizes": SIZES, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_measurement(measure, "benchmarks.real.adaptive_batches", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
