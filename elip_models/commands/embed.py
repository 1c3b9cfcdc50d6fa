"""The command `elip embed`: one vector for each image of a collection, as Parquet files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from elip_models.commands.image_folder import as_option_error
from elip_models.commands.pages import embed_documents
from elip_models.validation import ConfigError, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

if TYPE_CHECKING:
    from elip_models.embedding.run import Embedded

Reduction = Annotated[
    str | None,
    typer.Option(
        help="calibrated/best.json, a strategy such as merge, or none; default: as the model was "
        "saved."
    ),
]


def embed(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="Folder of images, tar files, list of paths, or Parquet files.")
    ],
    model: Annotated[
        str, typer.Option(help="timm:NAME[:FILE], open_clip:NAME[:TAG], hf:NAME or folder.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the vectors; a stopped run continues.")],
    reduce: Reduction = None,
    keep: Annotated[float | None, typer.Option(help="Mean share of the tokens.")] = None,
    preprocess: Annotated[
        str | None, typer.Option(help="imagenet, clip or a JSON file, for a model without its own.")
    ] = None,
    check: Annotated[
        int, typer.Option(min=0, help="Images encoded dense and reduced before the run.")
    ] = 200,
    min_cosine: Annotated[
        float | None, typer.Option(help="Stop if the mean cosine of the check is lower.")
    ] = None,
    keep_columns: Annotated[
        str, typer.Option(help="Columns of the source for the output, separated by commas.")
    ] = "",
    image_column: Annotated[str | None, typer.Option(help="Column of images or paths.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Column of keys.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=2**16, help="Images in a batch.")] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a file.")] = 10_000,
    workers: Annotated[
        int | None, typer.Option(min=0, max=1024, help="Processes that decode; set by the machine.")
    ] = None,
    embedding_dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    pretrained: Annotated[bool, typer.Option(help="Load the model's weights.")] = True,
    ray: Annotated[str | None, typer.Option(help="Cluster: local, auto or HOST:PORT.")] = None,
    ray_actors: Annotated[int | None, typer.Option(min=1, help="Actors on the cluster.")] = None,
    pages: Annotated[
        bool,
        typer.Option(
            "--pages",
            help="PDF files and images, with many vectors for each page: ColPali, ColQwen2.",
        ),
    ] = False,
) -> None:
    """Embed a collection of images: one vector for each, as Parquet files."""
    options = dict(locals())
    context = options.pop("context")
    if options.pop("pages"):
        embed_documents(embed, context, options, _bars)
        return
    options["keep_columns"] = tuple(filter(None, map(str.strip, keep_columns.split(","))))
    result = _embed(options.pop("model"), options.pop("source"), options.pop("output"), options)
    if not _is_first():  # of the processes of torchrun
        return
    speed = ""
    if result.images_per_second is not None:
        speed = f" ({result.images_per_second:.1f} images/s)"
    line = f"{result.folder}: {result.embedded} of {result.found} images embedded{speed}"
    if result.skipped:
        line += f", {result.skipped} skipped, listed in {result.folder / 'skipped.parquet'}"
    Console().print(escape(line), soft_wrap=True, highlight=False)
    error = None
    if result.non_finite:
        error = f"{result.non_finite} embeddings have NaN or infinity; the images are skipped"
    elif not result.embedded:
        error = "no image was embedded; skipped.parquet has the reasons"
    if error is not None:
        Console(stderr=True).print(escape(f"error: {error}"), soft_wrap=True, highlight=False)
        raise typer.Exit(1)


def _is_first() -> bool:
    """Return whether this process, of those of torchrun, prints."""
    return os.environ.get("RANK", "0") == "0"


def _embed(model: str, source: str, output: Path, options: dict[str, Any]) -> "Embedded":
    """Call `elip_models.embed` with a progress bar, and name the options in its errors."""
    with require_extra("elip embed"):
        from elip_models.embedding.run import embed as embed_collection

    console = Console(stderr=True)
    with as_option_error(embed, errors=ConfigError), _bars(console) as bars:
        bar = bars.add_task("", total=None, skipped=0)

        def show(done: int, skipped: int, total: int) -> None:
            bars.update(bar, completed=done, skipped=skipped, total=total)

        def report(text: str) -> None:
            bars.console.print(escape(text), soft_wrap=True, highlight=False)

        return embed_collection(model, source, output, progress=show, report=report, **options)


class _Rate(ProgressColumn):
    """Images, or pages, per second."""

    def render(self, task: Task) -> Text:
        """Return the rate, if it is known."""
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def _bars(console: Console, what: str = "images") -> Progress:
    """Return a progress bar, shown on a terminal only."""
    skipped = TextColumn("{task.fields[skipped]} skipped")
    columns = TextColumn(what), MofNCompleteColumn(), BarColumn(), _Rate(), skipped
    left = TimeRemainingColumn(), TextColumn("left")
    disabled = not (console.is_terminal and _is_first())
    return Progress(*columns, *left, console=console, disable=disabled)
