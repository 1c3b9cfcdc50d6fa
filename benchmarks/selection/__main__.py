"""Which patches a reduction keeps of what captions name: `python -m benchmarks.selection`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.selection.scores import selection_scores
from elip_models.cli import run_command
from elip_models.commands.evaluate import SavedModel, open_trained, weights_folder
from elip_models.pretraining.data import open_source
from elip_models.reduction.strategy_spec import fit_strategy, get_strategy
from elip_models.saving.files import write_json
from elip_models.validation import as_config_error, check_output

STAGE_COLUMNS = {
    "kept": "named kept %",
    "purity": "purity %",
    "changed_by_another_caption": "changed by another caption %",
    "changed_by_another_image": "by another image's %",
    "agrees": "agrees with exact %",
}
WHOLE_ROWS = {
    "lost": "1 - cos(reduced, dense)",
    "all_patches": "matching score, all patches",
    "insertion": "insertion, area",
    "random": "in random order",
    "deletion": "deletion",
}


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


def selection_tables(scores: dict[str, Any]) -> tuple[Table, Table]:
    """Return tables of the result of `selection_scores`, with half of each 95% interval.

    The first is by stage, in percent, with chance in brackets; the second is of the whole image.
    """
    table = Table(
        title=f"{scores['strategy']}\n{scores['num_images']} images, {scores['num_patches']} "
        "patches (chance in brackets)"
    )
    table.add_column("block")
    table.add_column("keep", justify="right")
    for column in STAGE_COLUMNS.values():
        table.add_column(column, justify="right")
    for stage in scores["stages"]:
        cells = (_interval(stage[key], 100, 1, stage.get(f"{key}_chance")) for key in STAGE_COLUMNS)
        table.add_row(str(stage["block"]), str(stage["keep"]), *cells)
    whole = Table(show_header=False)
    for key, name in WHOLE_ROWS.items():
        whole.add_row(name, _interval(scores[key], 1, 4))
    return table, whole


def _interval(
    interval: dict[str, Any] | None, scale: int, digits: int, chance: dict[str, Any] | None = None
) -> str:
    if interval is None:
        return "-"
    text = f"{scale * interval['mean']:.{digits}f}"
    if interval["high"] is not None:
        text += f" ± {scale * (interval['high'] - interval['mean']):.{digits}f}"
    return text if chance is None else f"{text} ({scale * chance['mean']:.{digits}f})"


if __name__ == "__main__":
    run_command(selection, name="python -m benchmarks.selection")
