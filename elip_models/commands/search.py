"""The commands `elip search` and `elip index`: search in the output of `elip embed`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from elip_models.commands.image_folder import as_option_error
from elip_models.validation import ConfigError, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

if TYPE_CHECKING:
    from elip_models.embedding.search import SearchResult

PAGES = "pages.json"
"""The file of an index of pages, see `embedding/pages.py`."""


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
    if (folder / PAGES).is_file():
        _search_pages(folder, query, model, top, as_json, device, pictures)
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


def _search_pages(
    folder: Path,
    query: str,
    model: str | None,
    top: int,
    as_json: bool,
    device: str | None,
    pictures: Path | None,
) -> None:
    """Search in the index of `elip embed --pages`, and write the pictures of what is found."""
    with require_extra("elip search"):
        from elip_models.embedding.pages import page_image, search_pages

    with _working("searching"):
        found = search_pages(folder, query, top=top, model=model, device=device)
    if as_json:
        typer.echo(json.dumps([page._asdict() for page in found], indent=2))
    else:
        table = Table("rank", "similarity", Column("file", overflow="fold"), "page")
        for page in found:
            row = str(page.rank), f"{page.similarity:.4f}", _printable(page.file), str(page.page)
            table.add_row(*row)
        Console().print(table)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for page in found:
            with as_option_error(search, errors=ConfigError, folder="FOLDER"):
                page_image(folder, page).save(pictures / f"{page.rank:02}.png")


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
        table.add_row(str(hit.rank), f"{hit.similarity:.4f}", _printable(hit.key))
    Console().print(table)
    how = "all compared" if result.index is None else f"by the {result.index} index"
    _print(f"{result.images} images, {how}")


def _printable(key: str) -> str:
    """Return a key as a cell of a table, which controls no terminal."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in key)
    return escape("".join(shown))
