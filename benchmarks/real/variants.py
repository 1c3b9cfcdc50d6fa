"""Look for a form of merging that loses less than the default, on photographs that may choose.

    python -m benchmarks.real.variants FOLDER --output variants.json    # goes on where it stopped

The photographs are those of the panel's sets that the panel does not measure, see `sets.py`. All
variants of a group have about the FLOPs of the first one. A variant is judged by probes of its own
features, cross-fitted, and their cross-entropy decides: a share of right photographs is too coarse
to tell variants apart. Features are stored in FOLDER/features.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import elip_models
from benchmarks.machine import provenance
from benchmarks.real import dinov2, sets
from benchmarks.real.features import features
from benchmarks.real.measures import PENALTIES
from benchmarks.real.tasks import PACKAGES
from benchmarks.settings import Setting, read_settings
from elip_models.calibration.linear_probe import LinearProbe
from elip_models.intervals import LEVEL
from elip_models.saving.files import write_json
from elip_models.strategies.flops import inference_ratio
from elip_models.strategies.token_merging import TokenMerging
from elip_models.towers import TowerSize, as_tower
from elip_models.validation import check_output

SETS = ("aerial", "scenes", "waste", "mri")
"""Those with photographs that the panel does not measure."""
MOST = 400
"""Photographs of a set."""
GUIDED = "guided_tome:without_text=vision,compare=tokens,keep_norm=true"
GROUPS = {
    "merge 0.7": {
        "compare keys, as ToMe": "merge:compare=mean_key 0.7",
        "compare keys of all heads": "merge:compare=keys 0.7",
        "means of tokens, whose norms shrink": "merge:keep_norm=false 0.7",
        "attention without log(size)": "merge:proportional=false 0.7",
        "the last block for the class token": "merge:class_token_only=true 0.7",
        "more in early blocks": "merge:decrease=0.5 0.7",
        "most in early blocks": "merge:decrease=1.0 0.7",
        "in every second block": [1.0, 0.0] * 6,
        "not in the first four blocks": [0.0] * 4 + [1.0] * 8,
        "not in the last four blocks": [1.0] * 8 + [0.0] * 4,
        "not in the first and last two": [0.0] * 2 + [1.0] * 8 + [0.0] * 2,
        "near patches first": "merge:reach=4 0.7",
        "protect what the class token reads": f"{GUIDED},protect=0.3 0.7",
        "weigh by what the class token reads": f"{GUIDED},protect=0.0,weight=0.3 0.7",
        "a smaller image, too": "resize_merge 0.7",
        "a smaller image": "resize 0.7",
    },
    "resize_merge 0.5": {
        "196 px, more merges": "resize_merge:size=196 0.5",
        "168 px, fewer merges": "resize_merge:size=168 0.5",
        "compare keys, as ToMe": "resize_merge:compare=mean_key 0.5",
        "more in early blocks": "resize_merge:decrease=0.5 0.5",
        "the last block for the class token": "resize_merge:class_token_only=true 0.5",
        "merging alone": "merge 0.5",
        "a smaller image, 154 px": "resize:size=154",
        "a smaller image, 168 px": "resize:size=168",
    },
}
"""The first of each group -> what a variant does -> a setting, or the profile of its merges."""


def setting_of(variant: str | Sequence[float], model: nn.Module, target: float) -> Setting:
    """Return a variant as a setting; a profile is scaled to the share of the FLOPs `target`."""
    if isinstance(variant, str):
        return read_settings(variant, model)[1]
    strategy = scaled(variant, as_tower(model).size, target)
    reduced = elip_models.reduce_(copy.deepcopy(model), strategy=strategy)
    return Setting(str(strategy), reduced, elip_models.reduction_summary(reduced))


def scaled(profile: Sequence[float], size: TowerSize, target: float) -> TokenMerging:
    """Return the merges of a profile whose FLOPs are nearest to a share of the dense ones."""
    rates = (
        TokenMerging(r=tuple(round(r * share) for share in profile))
        for r in range(size.num_patches)
    )
    return min(rates, key=lambda strategy: abs(inference_ratio(strategy, size) - target))


class Judge:
    """The cross-entropy and the correctness of probes of a setting's own features, on one set."""

    def __init__(self, found: sets.LabelledSet, dense: Tensor) -> None:
        self.found = found
        self.penalties = [self._best_penalty(fold, dense) for fold in found.folds]

    def of(self, features: Tensor) -> Tensor:
        """Return (2, n): the cross-entropy of each photograph, and ones for right ones."""
        labels, parts = self.found.labels, []
        for fold, penalty in zip(self.found.folds, self.penalties, strict=True):
            probe = LinearProbe.fit(
                features[fold.train], labels[fold.train], inverse_penalty=penalty
            )
            truth, tested = labels[fold.test], features[fold.test]
            loss = F.cross_entropy(probe.logits(tested), truth, reduction="none")
            parts.append(torch.stack([loss, probe.correct(tested, truth)]))
        return torch.cat(parts, dim=1)

    def _best_penalty(self, fold: sets.Fold, dense: Tensor) -> float:
        labels = self.found.labels

        def loss(penalty: float) -> float:
            probe = LinearProbe.fit(dense[fold.train], labels[fold.train], inverse_penalty=penalty)
            logits = probe.logits(dense[fold.tune])
            return F.cross_entropy(logits, labels[fold.tune]).item()

        return min(PENALTIES, key=loss)


def contrast(judged: dict[str, Tensor], reference: dict[str, Tensor]) -> list[dict[str, float]]:
    """Return the mean over the sets of the paired differences, and their intervals.

    Args:
        judged, reference: by set, (2, n) as `Judge` returns them.

    Returns:
        One for the cross-entropy, one for the share of right photographs: the mean, and the ends of
        its interval, by the normal approximation.
    """
    gaps = [judged[name] - reference[name] for name in judged]
    means = torch.stack([gap.mean(1) for gap in gaps]).mean(0)
    variances = torch.stack([gap.var(1) / gap.shape[1] for gap in gaps]).sum(0)
    halves = NormalDist().inv_cdf((1 + LEVEL) / 2) * variances.sqrt() / len(gaps)
    return [
        {"mean": round(mean, 5), "low": round(mean - half, 5), "high": round(mean + half, 5)}
        for mean, half in zip(means.tolist(), halves.tolist(), strict=True)
    ]


def thinned(found: sets.LabelledSet) -> sets.LabelledSet:
    """Return at most `MOST` photographs of a set, of each class its share, with folds."""
    chosen = range(0, len(found.paths), -(-len(found.paths) // MOST))
    paths = [found.paths[i] for i in chosen]
    return sets.LabelledSet(paths, found.labels[list(chosen)], sets.cross_fitted(len(paths)))


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the results of all groups."""
    model = dinov2.timm_model().to(getattr(torch, options.dtype))
    panel = {name: thinned(sets.read(options.folder, name, explore=True)) for name in SETS}

    def vectors(setting: Setting, name: str) -> Tensor:
        folder, paths = options.folder / "features", panel[name].paths
        return features(setting, paths, folder, seed=0, advance=lambda count: None)

    dense = read_settings("", model)[0]
    judges = {name: Judge(found, vectors(dense, name)) for name, found in panel.items()}

    def judged(setting: Setting) -> dict[str, Tensor]:
        with console.status(setting.text):
            return {name: judge.of(vectors(setting, name)) for name, judge in judges.items()}

    of_dense = judged(dense)
    document = {
        **provenance(PACKAGES),
        "model": f"DINOv2 ViT-S/14, {dinov2.PIXELS} px, timm",
        "dtype": options.dtype,
        "photographs": {name: len(found.paths) for name, found in panel.items()},
        "groups": {},
    }
    for first, variants in GROUPS.items():
        base = read_settings(first, model)[1]
        of_base = judged(base)
        row = partial(_row, of_dense=of_dense, of_base=of_base)
        rows = [row(first, base, of_base)]
        for does, variant in variants.items():
            setting = setting_of(variant, model, base.summary.forward_flops)
            rows.append(row(does, setting, judged(setting)))
            console.print(does, rows[-1]["flops"], rows[-1]["from_first"], soft_wrap=True)
        document["groups"][first] = rows
    return document


def _row(
    does: str,
    setting: Setting,
    judged: dict[str, Tensor],
    *,
    of_dense: dict[str, Tensor],
    of_base: dict[str, Tensor],
) -> dict[str, Any]:
    names = ("cross_entropy", "top1")
    return {
        "does": does,
        "strategy": str(setting.summary.strategy),
        "flops": round(setting.summary.forward_flops, 4),
        "from_dense": dict(zip(names, contrast(judged, of_dense), strict=True)),
        "from_first": dict(zip(names, contrast(judged, of_base), strict=True)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real.variants", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="the materials, see sets.py")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the results are written")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        check_output("--output", options.output)
        document = measure(options, console)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    if options.output is not None:
        write_json(options.output, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
