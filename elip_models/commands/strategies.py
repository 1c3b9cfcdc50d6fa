"""The command `elip strategies`: the strategies of token reduction, one line each."""

from typing import Annotated

from elip_models.validation import as_config_error, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

WIDTH = 140  # characters, if the output is not a terminal


def strategies(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Model as of elip profile, such as timm:vit_base_patch16_224."
        ),
    ] = None,
) -> None:
    """List the strategies; with MODEL, those that can reduce it, and why others cannot."""
    import torch

    from elip_models.saving.open_model import open_model
    from elip_models.vlm.strategy_list import list_strategies

    opened = None
    if model is not None:
        with as_config_error("MODEL", inner="spec"), torch.device("meta"):
            opened = open_model(model, pretrained=False)
    with as_config_error("MODEL", inner="model"):
        entries = list_strategies(opened)
    columns = ("strategy", "where", "text", "keep", "what it does")
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=None)
    for entry in entries:
        if entry.why_unsupported is None:
            guidance = "guides" if entry.is_guided else "no"
            keep = "-" if entry.keep is None else f"{entry.keep:g}"
            table.add_row(entry.name, entry.place, guidance, keep, escape(entry.summary))
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(table)
    reasons = dict.fromkeys(entry.why_unsupported for entry in entries if entry.why_unsupported)
    for reason in reasons:
        names = ", ".join(entry.name for entry in entries if entry.why_unsupported == reason)
        console.print(escape(f"not supported: {names}: {reason}"), highlight=False)
