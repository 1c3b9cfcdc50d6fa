"""Pages of documents: many vectors each, in a table of LanceDB, found by late interaction.

    embed_pages("vidore/colqwen2-v1.0-hf", "documents", "index", reduce="diverse", keep=0.5)
    search_pages("index", "revenue by quarter")

    index/pages.json    which model embedded the pages, how it was reduced, and what it skipped
    index/pages.lance   a row for each page: file, page, count (N), vectors (N, D)

sentence-transformers runs the model. Queries are never reduced. The similarity is MaxSim:

    sum over the vectors q of the query of max over the vectors p of the page of q . p
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from elip_models.api import reduce_, strategies_in
from elip_models.images import IMAGE_ENDINGS, SampleError, decode_image
from elip_models.profiling.measure import device_named
from elip_models.saving.files import read_object, write_json
from elip_models.saving.locked_folder import locked_folder
from elip_models.strategies.strategy import Strategy
from elip_models.validation import (
    ConfigError,
    PositiveInt,
    as_config_error,
    check,
    require_extra,
    shortened,
)

with require_extra("elip embed --pages"):
    import lancedb
    import pyarrow
    from pypdfium2 import PdfDocument, PdfiumError
    from sentence_transformers import MultiVectorEncoder

if TYPE_CHECKING:
    from PIL import Image

MANIFEST, TABLE = "pages.json", "pages"
COUNT, VECTORS = "count", "vectors"
SCALE = 2
"""Pixels for a point of a PDF page, which is 1/72 inch: 144 dpi."""


class Page(NamedTuple):
    """A page: its file, relative to the folder, and its number in it, from 1."""

    file: str
    page: int


@dataclass(frozen=True)
class EmbeddedPages:
    """What `embed_pages` did.

    Attributes:
        folder: the folder of the index.
        pages: pages in the index.
        vectors: of all pages.
        skipped: the pages or files that cannot be read, and why.
    """

    folder: Path
    pages: int
    vectors: int
    skipped: dict[str, str]


class FoundPage(NamedTuple):
    """A page that was found, and its MaxSim with the query."""

    rank: int
    similarity: float
    file: str
    page: int


def embed_pages(
    model: str,
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    reduce: str | Strategy | None = None,
    keep: float | int | None = None,
    batch_size: int = 4,
    device: str | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> EmbeddedPages:
    """Embed the pages of PDF files and of images by a model with a vector for each token.

    A call that was stopped continues with the same arguments; pages in the index stay.

    Args:
        model: a folder, or a name on the hub, which `MultiVectorEncoder` of sentence-transformers
            opens: ColPali, ColQwen2 and others.
        source: the folder of PDF files and images, searched with its subfolders.
        output: the folder of the index.
        reduce: a strategy of language models, such as 'diverse'; None with `keep`: the default.
            None without it: as the model was saved, else dense.
        keep: the share, or the number, of the vectors of each image that stay.
        batch_size: pages in a batch.
        device: where the model runs. None: the GPU if there is one.
        progress: called with the pages in the index and all pages.

    Raises:
        ConfigError: an argument is not what is expected. The message begins with its name.
    """
    batch_size = check("batch_size", batch_size, PositiveInt)
    folder, target = Path(source), Path(output)
    found = _documents(folder)
    with locked_folder(target, "output", marker=MANIFEST):
        encoder = _opened(model, device)
        with as_config_error("reduce", inner="strategy"):
            saved = getattr(encoder[0].model.config, "elip", None)
            if reduce is not None or keep is not None or saved is not None:
                reduce_(encoder, reduce, keep)
        strategies = [str(strategy) for strategy in strategies_in(encoder)]
        settings = {"model": model, "source": str(folder.resolve()), "strategies": strategies}
        _check_same(target, settings)
        write_json(target / MANIFEST, settings)
        table = _table(target, encoder.get_embedding_dimension())
        known, skipped = _counts(table), {}
        pages = [page for document in found for page in _pages_of(folder, document, skipped)]
        missing = [page for page in pages if page not in known]
        for first in range(0, len(missing), batch_size):
            batch = missing[first : first + batch_size]
            rendered = {page: _rendered(folder, page, skipped) for page in batch}
            images = {page: image for page, image in rendered.items() if image is not None}
            if images:
                vectors = encoder.encode_document(
                    list(images.values()), batch_size=batch_size, show_progress_bar=False
                )
                table.add(_as_arrow(list(images), vectors, table.schema))
            progress(len(pages) - len(missing) + first + len(batch), len(pages))
        write_json(target / MANIFEST, settings | {"skipped": skipped})
        counts = _counts(table)
        return EmbeddedPages(target, len(counts), sum(counts.values()), skipped)


def search_pages(
    folder: str | os.PathLike,
    query: str,
    *,
    top: int = 10,
    model: str | None = None,
    device: str | None = None,
) -> tuple[FoundPage, ...]:
    """Return the pages of an index that are most similar to a text, by MaxSim.

    Args:
        folder: of `embed_pages`.
        query: the text.
        top: how many pages.
        model: where the model is now. None: where it was.
        device: where it runs. None: the GPU if there is one.

    Raises:
        ConfigError: an argument is not what is expected. The message begins with its name.
    """
    top, index = check("top", top, PositiveInt), Path(folder)
    if not query.strip():
        raise ConfigError(f"query: expected a text, got {query!r}")
    if not is_page_index(index):
        raise ConfigError(f"folder: expected an index with {MANIFEST}, got {index}")
    encoder = _opened(model or read_object(index / MANIFEST)["model"], device)
    vectors = encoder.encode_query([query], convert_to_numpy=True)[0]
    table = lancedb.connect(index).open_table(TABLE)
    search = table.search(vectors, vector_column_name=VECTORS).distance_type("cosine")
    rows = search.select([*Page._fields, "_distance"]).limit(top).to_list()
    return tuple(  # LanceDB adds up 1 - cosine over the vectors of the query
        FoundPage(rank, len(vectors) - row["_distance"], row["file"], row["page"])
        for rank, row in enumerate(rows, 1)
    )


def page_image(folder: str | os.PathLike, page: FoundPage) -> "Image.Image":
    """Return the picture of a page that was found, from its file.

    Args:
        folder: of `embed_pages`.
        page: of `search_pages`.

    Raises:
        ConfigError: the file is gone, or damaged.
    """
    source, skipped = Path(read_object(Path(folder) / MANIFEST)["source"]), {}
    image = _rendered(source, Page(page.file, page.page), skipped)
    if image is None:
        raise ConfigError(f"folder: expected {source / page.file}, got: {skipped.popitem()[1]}")
    return image


def is_page_index(folder: Path) -> bool:
    """Return whether `embed_pages` wrote a folder."""
    return (folder / MANIFEST).is_file()


def _documents(folder: Path) -> list[Path]:
    endings = (".pdf", *IMAGE_ENDINGS)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)
    if not found:
        raise ConfigError(
            f"source: expected a folder with files {', '.join(endings)}, got {str(folder)!r}"
        )
    return found


def _opened(model: str, device: str | None) -> MultiVectorEncoder:
    with as_config_error("device"):
        place = device_named(device)
    with as_config_error("model"):
        return MultiVectorEncoder(str(model).removeprefix("hf:"), device=str(place))


def _check_same(target: Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError if the folder has pages that were embedded in another way."""
    if not is_page_index(target):
        return
    written = read_object(target / MANIFEST)
    for name, value in settings.items():
        if written.get(name) != value:
            raise ConfigError(
                f"output: expected a new folder, or one of the same {name}, got {target} with "
                f"{shortened(written.get(name))} in place of {shortened(value)}"
            )


def _table(target: Path, dimension: int) -> Any:
    vectors = pyarrow.list_(pyarrow.list_(pyarrow.float32(), dimension))
    fields = [("file", pyarrow.string()), ("page", pyarrow.int32())]
    fields += [(COUNT, pyarrow.int32()), (VECTORS, vectors)]
    return lancedb.connect(target).create_table(TABLE, schema=pyarrow.schema(fields), exist_ok=True)


def _counts(table: Any) -> dict[Page, int]:
    """Return the number of vectors of each page of a table."""
    columns = [*Page._fields, COUNT]
    rows = table.search().select(columns).limit(max(1, table.count_rows())).to_list()
    return {Page(row["file"], row["page"]): row[COUNT] for row in rows}


def _pages_of(folder: Path, document: Path, skipped: dict[str, str]) -> Iterator[Page]:
    file, count = document.relative_to(folder).as_posix(), 1
    if document.suffix.lower() == ".pdf":
        try:
            with PdfDocument(document) as pdf:
                count = len(pdf)
        except (OSError, PdfiumError) as error:
            skipped[file] = str(error)
            return
    yield from (Page(file, number) for number in range(1, count + 1))


def _rendered(folder: Path, page: Page, skipped: dict[str, str]) -> "Image.Image | None":
    """Return the picture of a page; None, with the reason in `skipped`, if it cannot be read."""
    path = folder / page.file
    try:
        if path.suffix.lower() != ".pdf":
            return decode_image(path, page.file)
        with PdfDocument(path) as pdf:
            return pdf[page.page - 1].render(scale=SCALE).to_pil().convert("RGB")
    except (OSError, PdfiumError, SampleError) as error:
        skipped[f"{page.file}, page {page.page}"] = str(error)
        return None


def _as_arrow(pages: list[Page], vectors: list[Any], schema: pyarrow.Schema) -> pyarrow.Table:
    rows = [
        {**page._asdict(), COUNT: len(of_page), VECTORS: of_page.float().cpu().tolist()}
        for page, of_page in zip(pages, vectors, strict=True)
    ]
    return pyarrow.Table.from_pylist(rows, schema=schema)
