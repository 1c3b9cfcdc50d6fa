"""The command `elip finetune TASK --from CHECKPOINT [key=value ...]`."""

from pathlib import Path
from typing import Annotated

from elip_models.commands.train import Resume
from elip_models.pretraining.training.recipe import parse_overrides
from elip_models.validation import require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console


def finetune(
    task: Annotated[
        str,
        typer.Argument(
            help="Task: retrieval, vqa, entailment, nlvr2, captioning, classification; or a "
            "recipe, such as vqa_tiny (all: elip recipes); or a YAML file."
        ),
    ],
    checkpoint: Annotated[
        Path, typer.Option("--from", help="Folder of a pre-trained model, or of its run.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Values of the recipe, such as data.train=vqa.json optim.lr=2e-5.",
        ),
    ] = None,
    reduced: Annotated[
        bool, typer.Option("--reduced", help="Reduce the image tower as in the saved model.")
    ] = False,
    resume: Resume = False,
) -> None:
    """Fine-tune a model for a downstream task, then score it."""
    from elip_models.pretraining.training.finetune import finetune_recipe
    from elip_models.pretraining.training.summary import print_summary
    from elip_models.pretraining.training.trainer import train

    values = parse_overrides(overrides or (), "optim.lr=2e-5")
    config = finetune_recipe(task, checkpoint, values, reduced=reduced)
    console = Console()
    result = train(config, resume=resume, console=console)
    if result.is_main_process:
        print_summary(config, result, console)
