"""The command `elip eval grounding`."""

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
from elip_models.pretraining.tasks.tables import task_table
from elip_models.validation import as_config_error, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console


def eval_grounding(
    model: SavedModel,
    data: Annotated[
        str,
        typer.Option(
            help="Data: emoji_grounding:seed=1,size=200, or a JSON list of expressions with boxes, "
            "such as refcoco+.json,images=coco,split=testA."
        ),
    ],
    layer: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Layer with cross attention, from 1; default: half of them, as ALBEF's 3 of 6.",
        ),
    ] = None,
    guided: Annotated[
        bool, typer.Option(help="Let the expression guide the reduction of its image.")
    ] = False,
    batch_size: BatchSize = 32,
    num_workers: NumWorkers = 0,
    max_bad_share: MaxBadShare = 0.05,
    output: ScoresFile = None,
) -> None:
    """Score where Grad-CAM of image-text matching finds what expressions refer to."""
    from elip_models.pretraining.data import open_examples
    from elip_models.pretraining.tasks.grounding import cross_attention, evaluate_grounding

    trained, tokenizer = open_trained(model, output)
    with as_config_error("--model", inner="model"):
        cross_attention(trained)
    with as_config_error("--layer", inner="layer"):
        cross_attention(trained, layer)
    with as_config_error("--data", inner="spec"):
        source = open_examples("grounding", data, image_size=trained.config.image_size)
    loading = loading_of(batch_size, num_workers, max_bad_share)
    scores = evaluate_grounding(trained, tokenizer, source, loading, layer=layer, guided=guided)
    Console().print(task_table(scores))
    write_scores(scores.as_dict(), output)
