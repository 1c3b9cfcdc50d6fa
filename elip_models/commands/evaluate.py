"""`elip eval retrieval | zero-shot | selection`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from elip_models.tasks.tables import retrieval_table, selection_tables, zero_shot_table
from elip_models.validation import ConfigError, blame, extra

with extra("elip_models.commands"):
    import typer
    from rich.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.models.base import PretrainedModel

app = typer.Typer(no_args_is_help=True, help="Score a trained model.")

SavedModel = Annotated[Path, typer.Option(help="Folder of a saved model and its tokenizer.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a forward pass.")]
NumWorkers = Annotated[int, typer.Option(min=0, help="Processes that load images.")]
MaxBadShare = Annotated[float, typer.Option(min=0, max=1, help="Unreadable at most.")]
ScoresFile = Annotated[Path | None, typer.Option(help="Write the scores here, as JSON.")]


@app.command("retrieval")
def eval_retrieval(
    model: SavedModel,
    data: Annotated[
        str, typer.Option(help="JSON list, tar shards or emoji_scenes:seed=1,size=500.")
    ],
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = 0,
    max_bad_share: MaxBadShare = 0.05,
    output: ScoresFile = None,
) -> None:
    """Recall@1/5/10 from image to text and from text to image."""
    from elip_models.data import open_source
    from elip_models.tasks.retrieval import evaluate_retrieval

    trained, tokenizer = _open_trained(model, output)
    with blame("--data"):
        source = open_source(data, image_size=trained.config.image_size)
    loading = {"batch_size": batch_size, "num_workers": num_workers, "max_bad_share": max_bad_share}
    scores = evaluate_retrieval(trained, tokenizer, source, **loading)
    Console().print(retrieval_table(scores))
    _write_scores(asdict(scores), output)


@app.command("zero-shot")
def eval_zero_shot(
    model: SavedModel,
    data: Annotated[
        str, typer.Option(help="Folder with a folder of images a class, or emoji_classes:size=600.")
    ],
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = 0,
    max_bad_share: MaxBadShare = 0.05,
    output: ScoresFile = None,
) -> None:
    """Top-1/5 accuracy of classes by their names."""
    from elip_models.data import open_classes
    from elip_models.tasks.zero_shot import evaluate_zero_shot

    trained, tokenizer = _open_trained(model, output)
    with blame("--data"):
        source = open_classes(data, image_size=trained.config.image_size)
    loading = {"batch_size": batch_size, "num_workers": num_workers, "max_bad_share": max_bad_share}
    scores = evaluate_zero_shot(trained, tokenizer, source, **loading)
    Console().print(zero_shot_table(scores))
    _write_scores(asdict(scores), output)


@app.command("selection")
def eval_selection(
    model: SavedModel,
    data: Annotated[
        str, typer.Option(help="emoji_scenes:size=200,clutter=4, or a JSON list with boxes.")
    ],
    strategy: Annotated[
        str | None, typer.Option(help="Such as elip:scorer=exact, tome; default: the model's own.")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Samples of --data.")] = 200,
    batch_size: BatchSize = 32,
    output: ScoresFile = None,
) -> None:
    """What a reduction keeps of what captions name, against chance, and what that changes."""
    from elip_models.analysis.selection import selection_scores
    from elip_models.data import open_source
    from elip_models.reduction.strategy_spec import get_strategy

    trained, tokenizer = _open_trained(model, output, ranks=False)
    with blame("--data"):
        source = open_source(data, image_size=trained.config.image_size)
    with blame("--strategy"):
        chosen = get_strategy(strategy).fitted(trained.tower) if strategy else None
    settings = {"limit": count, "batch_size": batch_size}
    scores = selection_scores(trained, source, tokenizer, chosen, **settings)
    Console().print(*selection_tables(scores))
    _write_scores(scores, output)


def _open_trained(
    model: Path, output: Path | None, *, ranks: bool = True
) -> "tuple[PretrainedModel, PreTrainedTokenizerBase]":
    """A saved model that ranks, or any, where it runs fastest, and its tokenizer."""
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output: expected a file in an existing folder, got {output}")
    import torch

    from elip_models.data import load_tokenizer
    from elip_models.models.registry import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with blame("--model"):
        trained = load_model(model).to(device)
        if ranks and not trained.ranks:
            raise ValueError(
                f"expected a model with features to rank, got {type(trained).__name__}, which has "
                "none of images and texts alone"
            )
        return trained, load_tokenizer(str(model))


def _write_scores(scores: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
