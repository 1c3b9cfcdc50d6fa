"""Pages of documents, in the commands `elip embed --pages` and `elip search`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elip_models.commands.image_folder import as_option_error
from elip_models.validation import ConfigError, require_extra, shortened

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress
    from rich.table import Column, Table

if TYPE_CHECKING:
    from elip_models.embedding.pages import FoundPage

INDEX = "pages.json"
"""The file of an index of pages, see `embedding/pages.py`."""
OPTIONS = ("model", "source", "output", "reduce", "keep", "batch_size", "device", "pages")
"""Those of `elip embed --pages`; the others are of collections with one vector for an image."""
IN_BATCH = 4
"""Pages in a batch, unless the option sets it."""


def embed_documents(
    command: Callable[..., None],
    context: typer.Context,
    options: dict[str, Any],
    bars: Callable[[Console, str], Progress],
) -> None:
    """Embed the pages of documents with a progress bar, and print what was done.

    Args:
        command: whose options errors name.
        context: tells which options the user gave.
        options: all, by name.
        bars: makes the progress bar.
    """
    sources = {name: context.get_parameter_source(name) for name in options}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if other := [name for name in given if name not in OPTIONS]:
        raise ConfigError(
            f"--{other[0].replace('_', '-')}: expected none with --pages, got "
            f"{shortened(options[other[0]])}"
        )
    with require_extra("elip embed --pages"):
        from elip_models.embedding.pages import embed_pages

    options = {name: options[name] for name in OPTIONS if name in options}
    options["batch_size"] = options["batch_size"] if "batch_size" in given else IN_BATCH
    console = Console(stderr=True)
    with as_option_error(command, errors=ConfigError), bars(console, "pages") as shown:
        bar = shown.add_task("", total=None, skipped=0)
        result = embed_pages(
            **options, progress=lambda done, total: shown.update(bar, completed=done, total=total)
        )
    for name, reason in result.skipped.items():
        console.print(escape(f"skipped {name}: {reason}"), soft_wrap=True, highlight=False)
    line = f"{result.folder}: {result.pages} pages with {result.vectors} vectors"
    Console().print(escape(line), soft_wrap=True, highlight=False)
    if not result.pages:
        raise typer.Exit(1)


def is_page_index(folder: Path) -> bool:
    """Return whether a folder is an index of pages."""
    return (folder / INDEX).is_file()


def found_pages(
    folder: Path, query: str, model: str | None, top: int, device: str | None, pictures: Path | None
) -> "tuple[FoundPage, ...]":
    """Search in an index of pages, and write the pictures of those that are found to a folder."""
    with require_extra("elip search"):
        from elip_models.embedding.pages import page_image, search_pages

    found = search_pages(folder, query, top=top, model=model, device=device)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for page in found:
            page_image(folder, page).save(pictures / f"{page.rank:02}.png")
    return found


def show_pages(found: "tuple[FoundPage, ...]", *, as_json: bool) -> None:
    """Print the pages that were found."""
    if as_json:
        typer.echo(json.dumps([page._asdict() for page in found], indent=2))
        return
    table = Table("rank", "similarity", Column("file", overflow="fold"), "page")
    for page in found:
        row = str(page.rank), f"{page.similarity:.4f}", printable(page.file), str(page.page)
        table.add_row(*row)
    Console().print(table)


def printable(key: str) -> str:
    """Return a key as a cell of a table, which controls no terminal."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in key)
    return escape("".join(shown))
