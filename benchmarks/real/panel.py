"""Measure what settings cost a pretrained DINOv2 on a panel of labelled photographs.

    python -m benchmarks.real.panel FOLDER --output panel.json          # goes on where it stopped
    python -m benchmarks.real.panel FOLDER --output panel.json --time   # adds the times

`sets.py` says which sets there are, and which photographs are measured. Each photograph is
classified by a linear probe of dense features, by a probe of the setting's own features (what
someone has who adopts the setting), and by its nearest neighbours. All three are fitted on other
photographs. Differences from dense are paired by photograph, see `paired_interval`. A setting is
non-inferior on a set if the lower end of the interval is above -`MARGIN`.

Features are stored in FOLDER/features, and outcomes in FOLDER/outcomes.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks.machine import provenance
from benchmarks.median_interval import median_interval
from benchmarks.real import dinov2, sets
from benchmarks.real.features import features, stored
from benchmarks.real.measures import KNN, OWN, PENALTIES, TOP1, knn_correct
from benchmarks.real.tasks import PACKAGES
from benchmarks.settings import DENSE, Setting, read_settings
from elip_models.calibration.linear_probe import LinearProbe
from elip_models.intervals import paired_interval
from elip_models.profiling.measure import ratios_to, time_side_by_side
from elip_models.saving.files import read_object, write_json
from elip_models.validation import check_output

MARGIN = 0.01
"""Share of the photographs, named before the first measurement."""
MEASURES = (TOP1, OWN, KNN)
SETTINGS = (
    "merge 0.7, tome 0.715, resize:size=196, evit 0.725, random 0.735, "
    "resize_merge 0.5, resize:size=168, resize:size=154, merge 0.455"
)
"""At about 0.68 and 0.46 of the time at batch 8. A smaller image has a multiple of 14 pixels."""
BATCHES = (1, 8)


class Outcomes:
    """Which photographs of a set are classified correctly under a setting."""

    def __init__(self, found: sets.LabelledSet, dense: Tensor) -> None:
        """Fit the probes of dense features.

        Args:
            found: the photographs.
            dense: (n, D) their dense features.
        """
        self.found, self.dense = found, dense
        self.probes, self.penalties = [], []
        for fold in found.folds:
            probe, penalty = self._tuned(fold)
            self.probes.append(probe)
            self.penalties.append(penalty)

    def of(self, reduced: Tensor) -> Tensor:
        """Return (`MEASURES`, m) ones for right photographs, in the order of `tested`."""
        labels, parts = self.found.labels, []
        for fold, probe, penalty in zip(self.found.folds, self.probes, self.penalties, strict=True):
            tested, truth = reduced[fold.test], labels[fold.test]
            own = LinearProbe.fit(reduced[fold.train], labels[fold.train], inverse_penalty=penalty)
            nearest = knn_correct(tested, truth, self.dense[fold.train], labels[fold.train])
            parts.append(
                torch.stack([probe.correct(tested, truth), own.correct(tested, truth), nearest])
            )
        return torch.cat(parts, dim=1)

    def _tuned(self, fold: sets.Fold) -> tuple[LinearProbe, float]:
        """Return the probe of a fold's training photographs, and the penalty that tunes it best."""
        labels = self.found.labels

        def right(penalty: float) -> float:
            probe = LinearProbe.fit(
                self.dense[fold.train], labels[fold.train], inverse_penalty=penalty
            )
            return probe.correct(self.dense[fold.tune], labels[fold.tune]).mean().item()

        best = max(PENALTIES, key=right)
        probe = LinearProbe.fit(self.dense[fold.train], labels[fold.train], inverse_penalty=best)
        return probe, best


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the results of all sets and settings."""
    names = sets.names(options.sets)
    dtype = getattr(torch, options.dtype)
    settings = read_settings(options.settings, dinov2.timm_model().to(dtype))
    explored = {"explore": True} if options.explore else {}
    panel = {name: sets.read(options.folder, name, **explored) for name in names}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        total = len(settings) * sum(len(found.paths) for found in panel.values())
        task = progress.add_task("photographs", total=total)
        computed = partial(
            features,
            folder=options.folder / "features",
            seed=options.seed,
            advance=partial(progress.advance, task),
        )
        return {
            **provenance(PACKAGES),
            "model": f"DINOv2 ViT-S/14, {dinov2.PIXELS} px, timm",
            "dtype": options.dtype,
            "margin": MARGIN,
            "seed": options.seed,
            "held_out": sets.HELD_OUT,
            "explored": options.explore,
            "sets": {
                name: _measured(name, found, settings, computed, options.folder)
                for name, found in panel.items()
            },
        }


def _measured(
    name: str,
    found: sets.LabelledSet,
    settings: Sequence[Setting],
    computed: Any,
    folder: Path,
) -> dict[str, Any]:
    """Return the results of one set."""
    fitted: list[Outcomes] = []
    right: dict[str, Tensor] = {}
    for setting in settings:
        vectors = computed(setting, found.paths)

        def outcomes(vectors: Tensor = vectors) -> Tensor:
            if not fitted:
                fitted.append(Outcomes(found, computed(settings[0], found.paths)))
            return fitted[0].of(vectors)

        dtype = str(next(setting.model.parameters()).dtype)
        key = [setting.text, setting.weights, dtype, *map(str, found.paths)]
        right[setting.text] = stored(folder / "outcomes", key, outcomes)
    return {
        "shows": sets.SOURCES[name].shows,
        "photographs": len(found.tested),
        "dense": _shares(right[DENSE]),
        "correct": _packed(right[DENSE]),
        "settings": [row(each, right[each.text], right[DENSE]) for each in settings[1:]],
    }


def row(setting: Setting, right: Tensor, dense: Tensor) -> dict[str, Any]:
    """Return the results of one setting: differences from dense, and what was right."""
    return {
        "setting": setting.text,
        "strategy": str(setting.summary.strategy),
        "kept": round(setting.summary.keep, 4),
        "flops": round(setting.summary.forward_flops, 4),
        "difference": {name: difference(right[i], dense[i]) for i, name in enumerate(MEASURES)},
        "correct": _packed(right),
    }


def difference(correct: Tensor, reference: Tensor) -> dict[str, Any]:
    """Return gains, losses, their mean with its interval, and whether it is non-inferior."""
    gains = int((correct > reference).sum())
    losses = int((correct < reference).sum())
    interval = paired_interval(gains, losses, len(correct))
    ends = {end: round(value, 5) for end, value in interval._asdict().items()}
    return {"gains": gains, "losses": losses, **ends, "non_inferior": interval.low > -MARGIN}


def _shares(right: Tensor) -> dict[str, float]:
    return {name: round(right[i].mean().item(), 5) for i, name in enumerate(MEASURES)}


def _packed(right: Tensor) -> dict[str, str]:
    return {name: packed(right[i]) for i, name in enumerate(MEASURES)}


def packed(correct: Tensor) -> str:
    """Return ones and zeros (n,), read as one binary number, in hexadecimal digits."""
    bits = "".join(str(int(each)) for each in correct.tolist())
    return f"{int(bits, 2):0{-(-len(bits) // 4)}x}"


@torch.no_grad()
def add_times(
    settings: Sequence[Setting],
    run: Callable[[nn.Module, Tensor], object],
    pixels: tuple[int, int],
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Return the entry `time` of a document: the time of each setting relative to dense.

    The model runs in float32 on one thread. A ratio is the median of the rounds, with the interval
    of a median by order statistics.

    Args:
        settings: dense, and those of the document.
        run: calls a model with images.
        pixels: (height, width) of the images.
        rounds: in each of which all settings are timed once.
        console: shows the progress.
    """
    runs, before = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        steps = len(BATCHES) * len(settings) * (1 + rounds)
        advance = partial(progress.advance, progress.add_task("runs", total=steps))
        for batch in BATCHES:
            images = torch.randn(batch, 3, *pixels)
            times = time_side_by_side(
                {setting.text: partial(run, setting.model, images) for setting in settings},
                device=images.device,
                rounds=rounds,
                progress=advance,
            )
            runs.append(
                {
                    "batch": batch,
                    "dense_ms": round(1e3 * median(times[DENSE]), 2),
                    "ratios": ratios_to(DENSE, times, median_interval),
                }
            )
    torch.set_num_threads(before)
    measured = {**provenance(PACKAGES), "threads": 1, "dtype": "float32", "rounds": rounds}
    return {"time": measured | {"runs": runs}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.panel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, list(sets.SOURCES)
    add("folder", type=Path, help="the materials, see benchmarks/real/sets.py")
    add("--sets", nargs="+", choices=names, default=names, help="labelled sets (default: all)")
    add("--settings", default=SETTINGS, help="strategies and keep (default: %(default)s)")
    add("--explore", action="store_true", help="photographs on which settings may be chosen")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model")
    add("--seed", type=int, default=0, help="of random choices (default: %(default)s)")
    add("--output", type=Path, metavar="X.json", help="write the results to this file")
    add("--time", action="store_true", help="measure times alone, and add them to --output")
    add("--rounds", type=int, default=21, help="with --time, interleaved (default: %(default)s)")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        check_output("--output", options.output)
        if options.time:
            document = read_object(options.output)
            first, *_ = document["sets"].values()
            texts = ", ".join(each["setting"] for each in first["settings"])
            settings = read_settings(texts, dinov2.timm_model())
            size = (dinov2.PIXELS, dinov2.PIXELS)
            document |= add_times(settings, nn.Module.__call__, size, options.rounds, console)
        else:
            document = measure(options, console)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    for name, found in document["sets"].items():
        shares = ", ".join(f"{key} {share:.1%}" for key, share in found["dense"].items())
        console.print(f"{name}, {found['photographs']} photographs: {shares}")
        for each in found["settings"]:
            texts = (points(each["difference"][key]) for key in MEASURES)
            console.print(f"  {each['setting']}: {', '.join(texts)}")
    if options.output is not None:
        write_json(options.output, document)
    return 0


def points(interval: dict[str, Any]) -> str:
    """Return the mean and the ends of an interval in points, as text."""
    mean, low, high = (100 * interval[end] for end in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    sys.exit(main())
