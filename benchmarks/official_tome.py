"""Compare `tome` with the official implementation of ToMe: outputs, and time on this machine.

    git clone https://github.com/facebookresearch/ToMe
    python -m benchmarks.official_tome ToMe --output official_tome.json

The official code runs unchanged, on timm models with random weights, in float32 on one thread. Both
merge the same number of tokens in each block. Its licence is CC BY-NC 4.0.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import nn

import elip_models
from benchmarks.machine import PACKAGES, provenance
from benchmarks.real.panel import add_times
from benchmarks.settings import DENSE, Setting
from elip_models.saving.files import write_json
from elip_models.validation import check_output

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
MERGED = 13
"""Tokens that each block merges away, as the paper's DeiT-S does."""
OFFICIAL = "official ToMe"
OURS = (f"tome:r={MERGED}", f"merge:r={MERGED}")
PIXELS = 224


def official(folder: Path) -> Callable[[nn.Module], None]:
    """Return the official function that changes a timm model; `folder` is the clone."""
    if not (folder / "tome" / "patch").is_dir():
        raise FileNotFoundError(
            f"folder: expected a clone of github.com/facebookresearch/ToMe, got {folder}"
        )
    sys.path.insert(0, str(folder))
    try:
        return import_module("tome").patch.timm
    finally:
        sys.path.remove(str(folder))


@torch.no_grad()
def compared(
    name: str, patch: Callable[[nn.Module], None], rounds: int, console: Console
) -> dict[str, Any]:
    """Return the largest difference of outputs, and the times, of one model."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    theirs = copy.deepcopy(dense)
    patch(theirs)
    theirs.r = MERGED
    ours = [Setting(text, *_reduced(text, dense)) for text in OURS]
    summary = elip_models.reduction_summary(dense)
    settings = [Setting(DENSE, dense, summary), Setting(OFFICIAL, theirs, summary), *ours]
    images = torch.randn(8, 3, PIXELS, PIXELS)
    expected = theirs(images)
    error = (ours[0].model(images) - expected).abs().max() / expected.abs().max()
    pixels = (PIXELS, PIXELS)
    return {
        "largest_relative_difference": float(f"{error:.1e}"),
        "kept": round(ours[0].summary.keep, 4),
        **add_times(settings, nn.Module.__call__, pixels, rounds, console),
    }


def _reduced(text: str, dense: nn.Module) -> tuple[nn.Module, Any]:
    model = elip_models.reduce_(copy.deepcopy(dense), text)
    return model, elip_models.reduction_summary(model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.official_tome", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="clone of github.com/facebookresearch/ToMe")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the results are written")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        check_output("--output", options.output)
        patch = official(options.folder)
    except (ImportError, OSError) as error:
        parser.error(str(error))
    models = {name: compared(name, patch, options.rounds, console) for name in MODELS}
    document = {**provenance(PACKAGES), "merged_per_block": MERGED, "models": models}
    for name, found in models.items():
        console.print(name, found["largest_relative_difference"], found["time"]["runs"])
    if options.output is not None:
        write_json(options.output, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
