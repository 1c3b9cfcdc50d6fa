"""The commands `elip search` and `elip index`: search in the output of `elip embed`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from elip_models.commands.image_folder import as_option_error
from elip_models.commands.pages import found_pages, is_page_index, printable, show_pages
from elip_models.validation import ConfigError, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

if TYPE_CHECKING:
    from elip_models.embedding.search import SearchResult


def search(
    folder: Annotated[Path, typer.Argument(help="Folder of embeddings, which `elip embed` wrote.")],
    query: Annotated[str, typer.Argument(help="A text, or the path of an image.")],
    model: Annotated[
        str | None, typer.Option(help="Where the model of the embeddings is now, if it moved.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Images to find.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare all embeddings, even with an index.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu.")] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for the pictures of the pages that are found.")
    ] = None,
) -> None:
    """Search in a folder of embeddings by a text or an image; in one of pages by a text."""
    if is_page_index(folder):
        with _working("searching"):
            found = found_pages(folder, query, model, top, device, pictures)
        show_pages(found, as_json=as_json)
        return
    if pictures is not None:
        raise ConfigError(f"--pictures: expected none with images, got {pictures}")
    with require_extra("elip search"):
        from elip_models.embedding.search import search as search_collection

    with _working("searching") as report:
        result = search_collection(
            folder, query, top=top, model=model, exact=exact, device=device, report=report
        )
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2, default=str))
    else:
        _print_hits(result)


def index(
    folder: Annotated[Path, typer.Argument(help="Folder of embeddings, which `elip embed` wrote.")],
) -> None:
    """Build an index of faiss beside the embeddings, which makes a search in many of them fast."""
    with require_extra("elip index"):
        from elip_models.embedding.search import build_index

    with _working("building the index"):
        result = build_index(folder)
    _print(
        f"{folder}: {result.kind} index of {result.vectors.ntotal} images; it finds "
        f"{result.recall:.3f} of the ten nearest images of an exact search"
    )


@contextmanager
def _working(what: str) -> Iterator:
    """Show that the command works, and name its options in errors; yield a printer of lines."""
    console = Console(stderr=True)
    with as_option_error(search, errors=ConfigError, output="FOLDER"), console.status(what):
        yield lambda text: console.print(escape(text), soft_wrap=True, highlight=False)


def _print(text: str) -> None:
    Console().print(escape(text), soft_wrap=True, highlight=False)


def _print_hits(result: "SearchResult") -> None:
    table = Table("rank", "similarity", Column("key", overflow="fold"))
    for hit in result.hits:
        table.add_row(str(hit.rank), f"{hit.similarity:.4f}", printable(hit.key))
    Console().print(table)
    how = "all compared" if result.index is None else f"by the {result.index} index"
    _print(f"{result.images} images, {how}")
