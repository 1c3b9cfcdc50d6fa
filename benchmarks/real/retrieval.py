"""Measure what settings cost a pretrained DINOv2 in retrieval, on photographs that chose nothing.

    python -m benchmarks.real.retrieval FOLDER --output retrieval.json     # goes on after a stop

The training photographs of Flickr8k are cut into two halves. Linear maps of image and text features
into one space are fitted on one half, and the other half is measured: each caption looks for its
photograph among the 3,000 of its half, and each photograph for one of its five captions. The maps
are those of dense features, or of the setting's own (what someone has who adopts the setting).
Differences from dense are paired by photograph: five captions of a photograph are one cluster.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks.machine import provenance
from benchmarks.real import dinov2, materials
from benchmarks.real.features import features, stored
from benchmarks.real.measures import RECALLS, RetrievalMaps
from benchmarks.real.panel import MARGIN, SETTINGS, points
from benchmarks.real.tasks import PACKAGES
from benchmarks.settings import DENSE, read_settings
from elip_models.intervals import bootstrap_interval
from elip_models.saving.files import write_json
from elip_models.validation import check_output

MAPS = ("own", "dense")
Values = dict[str, Tensor]


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the photographs of two random halves."""
    first, second = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).chunk(2)
    return first, second


def recalls(fitted: Tensor, images: Tensor, texts: Tensor, *, seed: int) -> Values:
    """Return each of `RECALLS` by photograph (n,), measured by maps of the other half.

    Args:
        fitted: (n, D) the features that the maps are fitted on.
        images: (n, D) the features that are measured.
        texts: (n, `CAPTIONS`, E) features of their captions.
        seed: of the halves and of the maps.
    """
    measured = {name: torch.empty(len(images), dtype=torch.double) for name in RECALLS}
    parts = halves(len(images), seed)
    for train, test in (parts, parts[::-1]):
        maps = RetrievalMaps.fit(fitted[train], texts[train].flatten(0, 1), seed=seed)
        found = maps.recalls(images[test], texts[test].flatten(0, 1))
        for name, values in found.items():
            measured[name][test] = values
    return measured


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the results of all settings."""
    captioned = materials.flickr8k(options.folder, "train")
    settings = read_settings(
        options.settings, dinov2.timm_model().to(getattr(torch, options.dtype))
    )
    store = options.folder / "features"
    model = options.folder / "all-MiniLM-L6-v2"
    compute = partial(materials.text_features, captioned.captions, model)
    texts = stored(store, [model.name, *captioned.captions], compute)
    texts = texts.unflatten(0, (-1, materials.CAPTIONS))
    with Progress(console=console, disable=not console.is_terminal) as progress:
        total = len(settings) * len(captioned.paths)
        advance: Callable[[int], object] = partial(
            progress.advance, progress.add_task("photographs", total=total)
        )
        of = {
            setting.text: features(
                setting, captioned.paths, store, seed=options.seed, advance=advance
            )
            for setting in settings
        }
    dense = of[DENSE]
    reference = recalls(dense, dense, texts, seed=options.seed)
    rows = []
    for setting in settings[1:]:
        reduced = of[setting.text]
        values = {
            "own": recalls(reduced, reduced, texts, seed=options.seed),
            "dense": recalls(dense, reduced, texts, seed=options.seed),
        }
        rows.append(
            {
                "setting": setting.text,
                "strategy": str(setting.summary.strategy),
                "flops": round(setting.summary.forward_flops, 4),
                "difference": {maps: differences(values[maps], reference) for maps in MAPS},
                "recalled": packed(values["own"]),
            }
        )
    return {
        **provenance(PACKAGES),
        "model": f"DINOv2 ViT-S/14, {dinov2.PIXELS} px, timm",
        "dtype": options.dtype,
        "margin": MARGIN,
        "seed": options.seed,
        "photographs": len(captioned.paths),
        "dense": {name: round(values.mean().item(), 5) for name, values in reference.items()},
        "recalled": packed(reference),
        "settings": rows,
    }


def differences(values: Values, reference: Values) -> dict[str, dict[str, Any]]:
    """Return the mean difference of each recall with its interval, and whether it is within."""
    found = {}
    for name, each in values.items():
        interval = bootstrap_interval((each - reference[name]).numpy())
        ends = {end: round(value, 5) for end, value in interval._asdict().items()}
        found[name] = {**ends, "non_inferior": interval.low > -MARGIN}
    return found


def packed(values: Values) -> dict[str, str]:
    """Return a digit for each photograph: of texts, how many of its five captions are right."""
    counts = {name: materials.CAPTIONS if name.startswith("text") else 1 for name in values}
    return {
        name: "".join(str(round(each * counts[name])) for each in found.tolist())
        for name, found in values.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.retrieval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="the materials, see benchmarks/real/materials.py")
    add("--settings", default=SETTINGS, help="strategies and keep (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model")
    add("--seed", type=int, default=0, help="of halves, maps and draws (default: %(default)s)")
    add("--output", type=Path, metavar="X.json", help="write the results to this file")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        check_output("--output", options.output)
        document = measure(options, console)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    for row in document["settings"]:
        console.print(row["setting"])
        for maps, found in row["difference"].items():
            texts = (f"{name} {points(each)}" for name, each in found.items())
            console.print(f"  {maps} maps: {', '.join(texts)}")
    if options.output is not None:
        write_json(options.output, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
