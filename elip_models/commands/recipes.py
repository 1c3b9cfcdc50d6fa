"""The commands `elip recipes` and `elip recipes show NAME`."""

from typing import Annotated

from elip_models.pretraining.training.recipe import (
    FINETUNE,
    recipe_names,
    recipe_settings,
    recipe_title,
)
from elip_models.pretraining.training.yaml_config import REQUIRED, yaml_line
from elip_models.validation import as_config_error, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

BY_CHECKPOINT = ("model.name", "model.pretrained", "data.tokenizer")
"""Keys that `elip finetune` sets by its option --from."""

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def recipes(ctx: typer.Context) -> None:
    """List the recipes, or show the settings of one."""
    if ctx.invoked_subcommand is not None:
        return
    console = Console()
    for use, folder in (
        ("elip train NAME", ""),
        (f"elip {FINETUNE} NAME --from CHECKPOINT", FINETUNE),
    ):
        table = Table("recipe", "what it trains", title=use, title_justify="left")
        for name in recipe_names(folder):
            table.add_row(name.removeprefix(f"{FINETUNE}/"), escape(recipe_title(name)))
        console.print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Recipe, such as clip_tiny, or a YAML file.")],
) -> None:
    """Show the keys of a recipe: value, origin of the value, meaning."""
    with as_config_error("NAME"):
        settings = recipe_settings(name)
    trains = all(key != "task" or value is None for key, value, *_ in settings)
    table = Table(Column("key", no_wrap=True), "value", "from", "meaning")
    for key, value, source, meaning in settings:
        if not trains and key in BY_CHECKPOINT:
            value, source = "of the checkpoint", "--from"
        elif value == REQUIRED:
            value, source = f"set {key}=VALUE", "required"
        table.add_row(key, escape(yaml_line(value)), source, escape(meaning))
    Console().print(table)
