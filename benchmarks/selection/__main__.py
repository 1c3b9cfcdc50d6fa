"""Which patches a reduction keeps of what captions name: `python -m benchmarks.selection`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.selection.scores import selection_scores
from benchmarks.selection.tables import selection_tables
from elip_models.cli import run_command
from elip_models.commands.evaluate import SavedModel, open_trained, weights_folder
from elip_models.pretraining.data import open_source
from elip_models.reduction.strategy_spec import fit_strategy, get_strategy
from elip_models.saving.files import write_json
from elip_models.validation import as_config_error, check_output


def selection(
    model: SavedModel,
    data: Annotated[
        str, typer.Option(help="Data: emoji_scenes:size=200,clutter=4, or a JSON list with boxes.")
    ],
    strategy: Annotated[
        str | None,
        typer.Option(help="Strategy, such as elip:scorer=exact or tome; default: the model's own."),
    ] = None,
    count: Annotated[
        int, typer.Option(min=2, max=2**20, help="Number of samples of --data.")
    ] = 200,
    batch_size: Annotated[
        int, typer.Option(min=1, max=2**20, help="Images in a forward pass.")
    ] = 32,
    output: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
) -> None:
    """Measure which patches a reduction keeps of what captions name."""
    check_output("--output", output)
    trained, tokenizer = open_trained(weights_folder(model))
    with as_config_error("--data", inner="spec"):
        source = open_source(data, image_size=trained.config.image_size)
    with as_config_error("--strategy"):
        chosen = fit_strategy(get_strategy(strategy), trained.tower) if strategy else None
    settings = {"limit": count, "batch_size": batch_size}
    scores = selection_scores(trained, source, tokenizer, chosen, **settings)
    Console().print(*selection_tables(scores))
    if output is not None:
        write_json(output, scores)


if __name__ == "__main__":
    run_command(selection, name="python -m benchmarks.selection")
