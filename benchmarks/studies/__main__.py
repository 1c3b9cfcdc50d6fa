"""Train and compare the arms of a study over seeds: `python -m benchmarks.studies NAME`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.studies.command import Progress, write_page
from benchmarks.studies.plan import load_study, plan, seeds_of
from elip_models.cli import run_command
from elip_models.pretraining.training.recipe import parse_overrides
from elip_models.validation import check_output

STUDIES = (
    *("ablations", "guidance", "guidance_albef", "guidance_blip", "quality"),
    *("quality_emoji", "quality_flat", "reduced_later", "scorers", "text_removal"),
    "text_removal_meter",
)
"""Built-in studies ; most of them exist at full size, too."""


def study(
    name: Annotated[
        str,
        typer.Argument(
            help=f"Study: {', '.join(STUDIES)}; or NAME_full, at full size; or a YAML file."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Values of the recipe for every arm."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Arms to run, such as dense,tome.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds to run, such as 0,1,2.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the arms and the cost of a run of each.")
    ] = False,
    allow_dirty: Annotated[
        bool,
        typer.Option(
            "--allow-dirty", help="Run with uncommitted changes, which marks the results."
        ),
    ] = False,
    results: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Only write this page from the results.")
    ] = None,
) -> None:
    """Train and compare the arms of a study over seeds; finished runs stay."""
    check_output("--results", results)
    check_output("--page", page)
    chosen = load_study(name, parse_overrides(overrides or (), "optim.steps=100"))
    runs = plan(chosen, only=only.split(",") if only else (), seeds=seeds_of(seeds))
    file = results or chosen.results
    progress = Progress(chosen, runs, file, Console(), allow_dirty=allow_dirty)
    if page is not None:
        write_page(file, page)
    elif dry_run:
        progress.plan()
    else:
        progress.run()


if __name__ == "__main__":
    run_command(study, name="python -m benchmarks.studies")
