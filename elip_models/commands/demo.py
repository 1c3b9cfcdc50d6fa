"""The command `elip demo`: a local page on which a person sees what a reduction merges."""

import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from elip_models.commands.image_folder import as_option_error
from elip_models.validation import PACKAGES, ConfigError, require_extra, require_packages

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape


def demo(
    model: Annotated[
        str | None,
        typer.Argument(
            help="timm:NAME, open_clip:NAME:TAG, hf:NAME, or folder of a model or run; default: "
            "timm:vit_small_patch16_224."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of 127.0.0.1.")] = 7860,
    batch_size: Annotated[
        int, typer.Option(min=1, max=2**10, help="Images in a batch, for times.")
    ] = 4,
    preprocess: Annotated[
        str | None,
        typer.Option(help="imagenet, clip or a JSON file, for a model without preprocessing."),
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Load the model's weights.")] = True,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Folder of `elip embed`, to search in; its model is the default one."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Another host name of the page, such as that of a proxy; repeatable."),
    ] = None,
) -> None:
    """Open a local page: what a reduction merges in your images, and what it changes."""
    require_packages("elip demo", *PACKAGES["app"])
    if embeddings is not None and (preprocess is not None or not pretrained):
        name = "--preprocess" if preprocess is not None else "--no-pretrained"
        raise ConfigError(
            f"{name}: expected none with --embeddings, whose model and preprocessing are those of "
            f"{embeddings}"
        )
    console = Console(stderr=True)
    with console.status("opening the model"), warnings.catch_warnings():
        from elip_models.embedding.demo import CSS, DEFAULT_MODEL, Demo, build_page
        from elip_models.embedding.encoder import open_encoder
        from elip_models.embedding.page_server import PageServer, upload_folder
        from elip_models.user_warnings import UnguidedWarning

        warnings.simplefilter("ignore", UnguidedWarning)  # no text guides on the page
        if embeddings is None:
            encoder = open_encoder(
                model or DEFAULT_MODEL, preprocess=preprocess, pretrained=pretrained
            )
            collection = None
        else:
            from elip_models.embedding.collection import open_collection
            from elip_models.embedding.search import query_encoder

            with as_option_error(demo, errors=ConfigError, folder="--embeddings"):
                encoder = query_encoder(open_collection(embeddings), model)
            collection = embeddings, encoder
        compared = Demo(encoder)

    def announce(url: str) -> None:
        name = encoder.name if pretrained else f"{encoder.name}, random weights"
        console.print(escape(f"{name}: {url} (Ctrl+C ends it)"), soft_wrap=True)

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # deletes the uploads
    with upload_folder() as uploads, suppress(KeyboardInterrupt):
        page = build_page(
            compared,
            batch_size=batch_size,
            random_weights=not pretrained,
            embeddings=collection,
        )
        PageServer(
            page,
            uploads,
            port=port,
            allowed_hosts=allowed_host or (),
            css=CSS,
            on_start=announce,
        ).run()
