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
    from elip_models.embedding.search import NeighbourRecall, SearchResult

OPTIONS = {
    "folder": "FOLDER",
    "output": "FOLDER",
    "query": "QUERY",
    **{name: f"--{name}" for name in ("model", "top", "device", "queries", "seed")},
}
"""Argument of the functions of `elip_models.embedding` -> that of the command."""


def search(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of embeddings, which `elip embed` wrote.")
    ] = None,
    query: Annotated[str | None, typer.Argument(help="A text, or the path of an image.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model of the embeddings is now, if it moved.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Images to find, or neighbours to compare.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare all embeddings, even with an index.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="DENSE REDUCED",
            help="Instead of a search: the neighbours kept, of two embeddings of the same images.",
        ),
    ] = None,
    queries: Annotated[
        int, typer.Option(min=1, help="Images that --compare draws at random.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of this draw.")] = 0,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu.")] = None,
) -> None:
    """Search in a folder of embeddings by a text or an image, or compare two such folders."""
    if compare is not None:
        _check_alone(folder, query, model, exact, device)
        _compare(*compare, top, queries, seed, as_json)
        return
    if folder is None or query is None:
        name = "FOLDER" if folder is None else "QUERY"
        raise ConfigError(f"{name}: expected one, or --compare DENSE REDUCED, got none")
    with require_extra("elip search"):
        from elip_models.embedding.search import search as search_collection

    with _working("searching") as report:
        result = search_collection(
            folder, query, top=top, model=model, exact=exact, device=device, report=report
        )
    if as_json:
        _print_json(asdict(result))
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


def _check_alone(*values: str | Path | bool | None) -> None:
    """Raise ConfigError for an argument that --compare does not read."""
    names = "FOLDER", "QUERY", "--model", "--exact", "--device"
    for name, value in zip(names, values, strict=True):
        if value:
            raise ConfigError(f"{name}: expected none with --compare, got {value}")


def _compare(dense: Path, reduced: Path, top: int, queries: int, seed: int, as_json: bool) -> None:
    with require_extra("elip search"):
        from elip_models.embedding.search import compare_neighbours

    with _working("comparing"):
        comparison = compare_neighbours(dense, reduced, top=top, queries=queries, seed=seed)
    if as_json:
        _print_json(asdict(comparison) | {"recall": comparison.recall._asdict()})
    else:
        _print_recall(comparison)


@contextmanager
def _working(what: str) -> Iterator:
    """Show that the command works, and name its options in errors; yield a printer of lines."""
    console = Console(stderr=True)
    with as_option_error(OPTIONS, errors=ConfigError), console.status(what):
        yield lambda text: console.print(escape(text), soft_wrap=True, highlight=False)


def _print(text: str) -> None:
    Console().print(escape(text), soft_wrap=True, highlight=False)


def _print_json(content: dict) -> None:
    typer.echo(json.dumps(content, indent=2, default=str))


def _print_hits(result: "SearchResult") -> None:
    table = Table("rank", "similarity", Column("key", overflow="fold"))
    for hit in result.hits:
        table.add_row(str(hit.rank), f"{hit.similarity:.4f}", _printable(hit.key))
    Console().print(table)
    how = "all compared" if result.index is None else f"by the {result.index} index"
    _print(f"{result.images} images, {how}")


def _print_recall(comparison: "NeighbourRecall") -> None:
    mean, low, high = comparison.recall
    _print(
        f"neighbours kept, of {comparison.top}: {mean:.4f} (95% CI {low:.4f} to {high:.4f}, "
        f"{comparison.queries} queries among {comparison.images} images)"
    )
    if not comparison.same_weights:
        _print("the models of the two folders have different weights")
    for count, what in (
        (comparison.only_dense, f"only in {comparison.dense}"),
        (comparison.only_reduced, f"only in {comparison.reduced}"),
    ):
        if count:
            _print(f"images {what}, which are left out: {count}")


def _printable(key: str) -> str:
    """Return a key as a cell of a table, which controls no terminal."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in key)
    return escape("".join(shown))
