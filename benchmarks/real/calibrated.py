"""Check the choice of `calibrate` on photographs that it never saw.

    python -m benchmarks.real.calibrated FOLDER --output calibrated.json  # goes on after a stop

A user has 1,000 photographs. They are drawn from the part of a set that the panel does not measure,
and `calibrate` chooses a setting on them, with times. The panel's measured photographs then judge
the choice, by probes that are fitted on the user's 1,000. Features are stored in FOLDER/features,
and reports in FOLDER/calibrated.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import elip_models
from benchmarks.machine import provenance
from benchmarks.real import dinov2, sets
from benchmarks.real.features import features
from benchmarks.real.panel import MEASURES, Outcomes, difference, points
from benchmarks.real.tasks import PACKAGES
from benchmarks.settings import Setting
from elip_models.saving.files import write_json
from elip_models.strategies.serialization import strategy_of
from elip_models.validation import check_output

COUNT = 1000
TOLERANCE = 0.02
SETS = ("scenes", "mri")
"""Named before the first run; settings were never chosen on their measured photographs."""


def of_a_user(folder: Path, name: str, *, seed: int) -> sets.LabelledSet:
    """Return `COUNT` photographs to choose on, and behind them those that judge the choice."""
    unmeasured, measured = sets.read(folder, name, explore=True), sets.read(folder, name)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(unmeasured.paths), generator=generator)[:COUNT].sort().values
    if len(drawn) < COUNT:
        raise ValueError(
            f"sets: expected {COUNT} photographs to choose on, {name} has {len(drawn)}"
        )
    paths = [unmeasured.paths[i] for i in drawn] + measured.paths
    labels = torch.cat([unmeasured.labels[drawn], measured.labels])
    users = torch.arange(COUNT)
    is_tuned = users % sets.FOLDS == 0
    test = torch.arange(COUNT, len(paths))
    return sets.LabelledSet(paths, labels, [sets.Fold(users[~is_tuned], users[is_tuned], test)])


def checked(
    folder: Path, name: str, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Return the choice of one set: what `calibrate` says of it, and what the judges say."""
    found = of_a_user(folder, name, seed=options.seed)
    model = dinov2.timm_model().to(getattr(torch, options.dtype))
    images = torch.cat(list(dinov2.batches(found.paths[:COUNT])))
    reports = folder / "calibrated" / name
    with console.status(name) as status:
        results = elip_models.calibrate(
            model,
            images,
            labels=found.labels[:COUNT],
            task=options.task,
            tolerance=TOLERANCE,
            class_token_only=True,
            seed=options.seed,
            folder=reports,
            names=[path.name for path in found.paths[:COUNT]],
            progress=lambda line: status.update(f"{name}: {line}"),
        )
    results.save(reports)
    choice = results.chosen
    entry = {
        "calibrated_on": COUNT,
        "judged_on": len(found.tested),
        "sentence": results.sentence(),
        "confirmed": results.confirmed,
        "chosen": None if choice is None else choice.name,
    }
    if choice is None:
        return entry

    def vectors(setting: Setting) -> Any:
        store = folder / "features"
        return features(setting, found.paths, store, seed=options.seed, advance=lambda count: None)

    reduced = elip_models.reduce_(copy.deepcopy(model), strategy=strategy_of(choice.strategy))
    summary = elip_models.reduction_summary
    dense = vectors(Setting("dense", model, summary(model)))
    outcomes = Outcomes(found, dense)
    right = outcomes.of(vectors(Setting(choice.name, reduced, summary(reduced))))
    of_dense = outcomes.of(dense)
    judged = {each: difference(right[i], of_dense[i]) for i, each in enumerate(MEASURES)}
    within = {each: of["low"] > -TOLERANCE for each, of in judged.items()}
    return entry | {
        "time": results.cost(choice),
        "held_back": choice.held_back[results.decides]._asdict(),
        "judged": judged,
        "within": within,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real.calibrated", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="the materials, see sets.py")
    parser.add_argument("--sets", type=lambda text: text.split(","), default=list(SETS))
    parser.add_argument("--task", choices=("probe", "own-probe"), default="probe")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the results are written")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        check_output("--output", options.output)
        found = {n: checked(options.folder, n, options, console) for n in options.sets}
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    document = {
        **provenance(PACKAGES),
        "model": f"DINOv2 ViT-S/14, {dinov2.PIXELS} px, timm",
        "dtype": options.dtype,
        "task": options.task,
        "tolerance": TOLERANCE,
        "seed": options.seed,
        "sets": found,
    }
    for name, each in found.items():
        console.print(f"{name}: {each['sentence']}")
        for measure, of in each.get("judged", {}).items():
            console.print(f"  {measure}: {points(of)}")
    if options.output is not None:
        write_json(options.output, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
