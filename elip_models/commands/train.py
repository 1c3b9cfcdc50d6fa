"""The commands `elip train RECIPE [key=value ...]` and `elip study NAME`."""

from pathlib import Path
from typing import Annotated

from elip_models.pretraining.training.recipe import load_recipe, parse_overrides, recipe_names
from elip_models.validation import check_output, from_checkout, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console

STUDIES = (
    *("ablations", "guidance", "guidance_albef", "guidance_blip", "guidance_flat", "quality"),
    *("quality_emoji", "quality_flat", "reduced_later", "scorers", "text_removal"),
    "text_removal_meter",
)
"""Built-in studies of a checkout; most of them exist at full size, too."""
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue the run in output_dir from its newest checkpoint."),
]


def train(
    recipe: Annotated[
        str, typer.Argument(help=f"Recipe: {', '.join(recipe_names())}, or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Values of the recipe, such as optim.lr=3e-4 data.train=a.json.",
        ),
    ] = None,
    resume: Resume = False,
) -> None:
    """Train by a recipe, then report. On several GPUs: torchrun -m elip_models.cli train .."""
    config = load_recipe(recipe, overrides or ())
    from elip_models.pretraining.training.summary import print_summary
    from elip_models.pretraining.training.trainer import train as run_training

    console = Console()
    result = run_training(config, resume=resume, console=console)
    if result.is_main_process:
        print_summary(config, result, console)


def study(
    name: Annotated[
        str,
        typer.Argument(
            help=f"Study: {', '.join(STUDIES)}; or NAME_full, at full size; or a YAML file."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values of the recipe for every arm."),
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
    """Train and compare the arms of a study over seeds (needs a checkout); finished runs stay."""
    plans = from_checkout("studies.plan", "elip study")
    command = from_checkout("studies.command", "elip study")
    check_output("--results", results)
    check_output("--page", page)
    chosen = plans.load_study(name, parse_overrides(overrides or (), "optim.steps=100"))
    runs = plans.plan(chosen, only=only.split(",") if only else (), seeds=plans.seeds_of(seeds))
    found = results or chosen.results
    progress = command.Progress(chosen, runs, found, Console(), allow_dirty=allow_dirty)
    if page is not None:
        command.write_page(found, page)
    elif dry_run:
        progress.plan()
    else:
        progress.run()
