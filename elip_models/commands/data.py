"""`elip data check`."""

from typing import Annotated

from elip_models.tasks.tables import data_table
from elip_models.validation import blame, extra

with extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape

app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")


@app.command("check")
def check_data(
    specs: Annotated[
        list[str],
        typer.Argument(metavar="SPEC...", help="JSON list, tar shards, emoji_scenes:size=500."),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first samples.")] = None,
    image_size: Annotated[int, typer.Option(min=1, help="Of built-in scenes.")] = 224,
) -> None:
    """Read every sample of the sources; exit status 1 where some cannot be read."""
    from elip_models.data import check_source, open_source

    with blame("SPEC"):
        source = open_source(specs, image_size=image_size)
    console, named = Console(), escape(", ".join(specs))
    with console.status(f"reading {named}"):
        report = check_source(source, limit)
    captions = [text for i in range(report.seen) for text in source.captions(i)]
    console.print(data_table(named, len(source), report, captions))
    if report.reasons:
        console.print(escape(report.summary()), soft_wrap=True)
        raise typer.Exit(1)
