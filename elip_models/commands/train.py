"""The command `elip train RECIPE [key=value ...]`."""

from typing import Annotated

from elip_models.pretraining.training.recipe import load_recipe, recipe_names
from elip_models.validation import require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console

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
            metavar="KEY=VALUE",
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
