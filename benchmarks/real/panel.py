"""Measure what settings cost a pretrained DINOv2 on the test photographs of labelled sets.

    python -m benchmarks.real.panel FOLDER --sets groceries --output X.json

Each set has a linear probe, whose penalty its validation split chooses, and votes of the nearest
neighbours. Differences from dense are paired by photograph, see `paired_interval`. A setting is
non-inferior if the lower end of the interval of its top-1 is above -`MARGIN`. `materials.py` says
what FOLDER holds. Features are stored in FOLDER/features, so a run that was stopped continues.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks.machine import provenance
from benchmarks.real import dinov2, materials
from benchmarks.real.features import Setting, features, read_settings
from benchmarks.real.measures import fitted_probe, knn_correct
from benchmarks.real.tasks import KNN, OWN, PACKAGES, TITLE, TOP1
from elip_models.intervals import paired_interval
from elip_models.saving.files import write_json
from elip_models.validation import check_output

MARGIN = 0.01
"""Share of the photographs, named before the first measurement."""
SPLITS = ("train", "validation", "test")
SETTINGS = ", ".join(
    f"{strategy} {keep}" for keep in (0.7, 0.5) for strategy in ("merge", "tome", "resize", "evit")
)


class LabelledSet:
    """A set of the panel, with a probe that is fitted on its dense features."""

    def __init__(
        self,
        name: str,
        folder: Path,
        dense: Setting,
        *,
        seed: int,
        advance: Callable[[int], object],
    ) -> None:
        """Read the photographs and fit the probe.

        Args:
            name: a key of `materials.LABELLED`.
            folder: the materials.
            dense: the setting that reduces nothing.
            seed: of strategies that draw.
            advance: is called with numbers of photographs whose features were computed.
        """
        self.name, self.folder, self.seed, self.advance = name, folder, seed, advance
        self.splits = {split: getattr(materials, name)(folder, split) for split in SPLITS}
        self.probe, self.dense_train = self._probe(dense), self._of(dense, "train")

    def correct(self, setting: Setting, *, own: bool) -> dict[str, Tensor]:
        """Return each measure by photograph of the test split, (n,), ones where it is right.

        Args:
            setting: how the model reduces.
            own: also fit a probe on the setting's own features.
        """
        tested, labels = self._of(setting, "test"), self.splits["test"].labels
        found = {
            TOP1: self.probe.correct(tested, labels),
            KNN: knn_correct(tested, labels, self.dense_train, self.splits["train"].labels),
        }
        if own:
            found[OWN] = self._probe(setting).correct(tested, labels)
        return found

    def _probe(self, setting: Setting) -> Any:
        train, validation = self.splits["train"], self.splits["validation"]
        return fitted_probe(
            self._of(setting, "train"),
            train.labels,
            self._of(setting, "validation"),
            validation.labels,
        )

    def _of(self, setting: Setting, split: str) -> Tensor:
        paths, folder = self.splits[split].paths, self.folder / "features"
        return features(setting, paths, folder, seed=self.seed, advance=self.advance)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the results of all sets and settings."""
    dense, *settings = read_settings(options.settings, dinov2.timm_model())
    sets = {}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("photographs", total=None)
        for name in options.sets:
            one = LabelledSet(
                name,
                options.folder,
                dense,
                seed=options.seed,
                advance=partial(progress.advance, task),
            )
            reference = one.correct(dense, own=options.own)
            rows = []
            for setting in settings:
                progress.update(task, description=f"{name}, {setting.text}")
                rows.append(row(setting, one.correct(setting, own=options.own), reference))
            sets[name] = {
                "classes": materials.LABELLED[name],
                "photographs": {split: len(found.paths) for split, found in one.splits.items()},
                "dense": {each: mean(right) for each, right in reference.items()},
                "correct": {each: packed(right) for each, right in reference.items()},
                "settings": rows,
            }
    return {
        **provenance(PACKAGES),
        "model": TITLE,
        "margin": MARGIN,
        "seed": options.seed,
        "sets": sets,
    }


def row(
    setting: Setting, correct: dict[str, Tensor], reference: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the results of one setting: differences from dense, and what was right."""
    return {
        "setting": setting.text,
        "strategy": str(setting.summary.strategy),
        "kept": round(setting.summary.keep, 4),
        "flops": round(setting.summary.forward_flops, 4),
        "difference": {each: difference(correct[each], reference[each]) for each in correct},
        "correct": {each: packed(right) for each, right in correct.items()},
    }


def difference(correct: Tensor, reference: Tensor) -> dict[str, Any]:
    """Return gains, losses, their mean with its interval, and whether it is non-inferior."""
    gains = int((correct > reference).sum())
    losses = int((correct < reference).sum())
    interval = paired_interval(gains, losses, len(correct))
    ends = {end: round(value, 5) for end, value in interval._asdict().items()}
    return {"gains": gains, "losses": losses, **ends, "non_inferior": interval.low > -MARGIN}


def mean(correct: Tensor) -> float:
    """Return the share of ones."""
    return round(correct.mean().item(), 5)


def packed(correct: Tensor) -> str:
    """Return ones and zeros (n,), read as one binary number, in hexadecimal digits."""
    bits = "".join(str(int(each)) for each in correct.tolist())
    return f"{int(bits, 2):0{-(-len(bits) // 4)}x}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.panel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, names = parser.add_argument, list(materials.LABELLED)
    add("folder", type=Path, help="the materials, see benchmarks/real/materials.py")
    add("--sets", nargs="+", choices=names, default=names, help="labelled sets (default: all)")
    add("--settings", default=SETTINGS, help="strategies and keep (default: %(default)s)")
    add("--own", action="store_true", help="fit a probe on each setting's own features, too")
    add("--seed", type=int, default=0, help="of random choices (default: %(default)s)")
    add("--output", type=Path, metavar="X.json", help="write the results to this file")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        check_output("--output", options.output)
        document = measure(options, console)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    for name, found in document["sets"].items():
        console.print(f"{name}: dense {found['dense'][TOP1]:.1%} of {found['photographs']['test']}")
        for each in found["settings"]:
            gap = each["difference"][TOP1]
            mean_, low, high = (100 * gap[end] for end in ("mean", "low", "high"))
            console.print(f"  {each['setting']}: {mean_:+.1f} ({low:.1f} to {high:.1f})")
    if options.output is not None:
        write_json(options.output, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
