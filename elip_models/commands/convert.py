"""The command `elip convert`."""

from pathlib import Path
from typing import Annotated

from elip_models.pretraining.training.recipe import parse_overrides
from elip_models.validation import as_config_error, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint of ALBEF, BLIP, METER, open_clip or transformers: file or folder."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="New or empty folder to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Fields of the model's config, such as activation=quick_gelu.",
        ),
    ] = None,
    to: Annotated[str, typer.Option(help="Format to write: ours, hf or open_clip.")] = "ours",
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Image side in pixels; interpolates position embeddings."),
    ] = None,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(
            help="Patterns of our parameter names that the source may lack, such as 'itm_head.*'."
        ),
    ] = None,
    allow_unexpected: Annotated[
        list[str] | None, typer.Option(help="Patterns of parameter names of the source to drop.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of a tokenizer; default: the one in the source folder."
        ),
    ] = None,
) -> None:
    """Convert a checkpoint of another library to a model of this one, or the reverse."""
    from elip_models.pretraining.checkpoints.export import save_as
    from elip_models.pretraining.checkpoints.load import LoadReport, convert_checkpoint
    from elip_models.pretraining.data import load_tokenizer

    fields = parse_overrides(overrides or (), "vision_heads=12")
    fields |= {"image_size": image_size} if image_size else {}
    reports: list[LoadReport] = []
    with as_config_error("convert"):
        loaded = load_tokenizer(tokenizer) if tokenizer else None
        has_own = loaded is None and (source / "tokenizer_config.json").is_file()
        beside = load_tokenizer(source) if has_own else loaded
        model = convert_checkpoint(
            source,
            tokenizer=loaded,
            allow_missing=allow_missing or (),
            allow_unexpected=allow_unexpected or (),
            report=reports.append,
            **fields,
        )
        save_as(model, output, to, tokenizer=beside)
    lines = [report.summary() for report in reports] + [f"{type(model).__name__}: {output}"]
    Console().print(escape("\n".join(lines)), soft_wrap=True)
