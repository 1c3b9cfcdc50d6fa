"""The commands `elip recipes` and `elip recipes show NAME`."""

from typing import Annotated

from elip_models.training.recipe import FINETUNE, recipe_names, recipe_settings, recipe_title
from elip_models.training.yaml_config import REQUIRED, yaml_line
from elip_models.validation import ConfigError, did_you_mean, require_extra, shortened

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

BY_CHECKPOINT = ("model.name", "model.pretrained", "data.tokenizer")
"""Keys that `elip finetune` sets by its option --from."""

app = typer.Typer(invoke_without_command=True)


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
    name: Annotated[str, typer.Argument(help="Name of a recipe, such as clip_tiny.")],
) -> None:
    """Show each key of a recipe, its value, where the value comes from, and its meaning."""
    full = {each.removeprefix(f"{FINETUNE}/"): each for each in recipe_names(FINETUNE)}
    full |= {each: each for each in [*recipe_names(), *full.values()]}
    if name not in full:
        raise ConfigError(
            f"NAME: expected a name that `elip recipes` lists, got {shortened(name)}"
            f"{did_you_mean(name, full)}"
        )
    table = Table("key", "value", "from", "meaning")
    for key, value, source, meaning in recipe_settings(full[name]):
        if full[name].startswith(FINETUNE) and key in BY_CHECKPOINT:
            value, source = "of the checkpoint", "--from"
        elif value == REQUIRED:
            value, source = f"set {key}=VALUE", "required"
        table.add_row(key, escape(yaml_line(value)), source, escape(meaning))
    Console().print(table)
