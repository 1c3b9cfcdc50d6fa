"""The command `elip eval composition`."""

from typing import Annotated

from elip_models.commands.evaluate_options import (
    BatchSize,
    MaxBadShare,
    NumWorkers,
    SavedModel,
    ScoresFile,
    loading_of,
    open_trained,
    write_scores,
)
from elip_models.pretraining.tasks.tables import composition_table
from elip_models.validation import as_config_error, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console


def eval_composition(
    model: SavedModel,
    data: Annotated[
        str,
        typer.Option(
            help="Files of Winoground, ARO or SugarCrepe, such as examples.jsonl,images=FOLDER, or "
            "emoji_composition:seed=1,size=200."
        ),
    ],
    itm: Annotated[
        bool,
        typer.Option(help="Score by ITM, not by features; always on for METER."),
    ] = False,
    guided: Annotated[
        bool,
        typer.Option(
            help="Let each candidate caption guide the reduction of the image, which is then "
            "encoded once for each of its captions.",
        ),
    ] = False,
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = 0,
    max_bad_share: MaxBadShare = 0.05,
    output: ScoresFile = None,
) -> None:
    """Score Winoground, ARO or SugarCrepe: which of similar captions fits an image."""
    from elip_models.pretraining.tasks.composition import Composition

    task = Composition(itm=itm, guided=guided)
    loading = loading_of(batch_size, num_workers, max_bad_share)
    trained, tokenizer = open_trained(model, output)
    with as_config_error("--model", inner="model"):
        task.method(trained)
    with as_config_error("--data", inner="spec"):
        source = task.open(data, image_size=trained.config.image_size)
    scores = task.evaluate(trained, tokenizer, source, loading)
    Console().print(composition_table(scores))
    write_scores(scores.as_dict(), output)
