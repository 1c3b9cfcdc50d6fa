"""The commands `elip eval retrieval | zero-shot | composition | vqa | ..`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from elip_models.commands.evaluate_composition import eval_composition
from elip_models.commands.evaluate_grounding import eval_grounding
from elip_models.commands.evaluate_options import (
    BatchSize,
    MaxBadShare,
    NumWorkers,
    SavedModel,
    ScoresFile,
    loading_of,
    open_trained,
    weights_folder,
    write_scores,
)
from elip_models.pretraining.tasks.tables import retrieval_table, task_table, zero_shot_table
from elip_models.pretraining.training.recipe import parse_overrides
from elip_models.validation import as_config_error, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console

if TYPE_CHECKING:
    from elip_models.pretraining.models.base import PretrainedModel
    from elip_models.pretraining.tasks.retrieval import RetrievalScores
    from elip_models.pretraining.tasks.task import Loading, Task
    from elip_models.pretraining.tasks.zero_shot import ZeroShotScores

app = typer.Typer(no_args_is_help=True, help="Score a trained model.")
app.command("composition")(eval_composition)
app.command("grounding")(eval_grounding)


@app.command("retrieval")
def eval_retrieval(
    model: SavedModel,
    data: Annotated[
        str, typer.Option(help="Data: JSON list, tar shards or emoji_scenes:seed=1,size=500.")
    ],
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = 0,
    max_bad_share: MaxBadShare = 0.05,
    rerank: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="Number of candidates that ITM re-ranks.")
    ] = None,
    output: ScoresFile = None,
) -> None:
    """Compute recall@1/5/10 from image to text and from text to image."""
    from elip_models.pretraining.data import open_source
    from elip_models.pretraining.tasks.retrieval import evaluate_retrieval
    from elip_models.pretraining.tasks.retrieval_task import Retrieval

    loading = loading_of(batch_size, num_workers, max_bad_share)
    if rerank is not None:
        return _evaluate(Retrieval(candidates=rerank), model, data, loading, output)
    trained, tokenizer = open_trained(model, output, ranks=True)
    with as_config_error("--data", inner="spec"):
        source = open_source(data, image_size=trained.config.image_size)
    scores = evaluate_retrieval(trained, tokenizer, source, **loading._asdict())
    Console().print(retrieval_table(scores))
    write_scores(_as_dict(scores), output)


@app.command("zero-shot")
def eval_zero_shot(
    model: SavedModel,
    data: Annotated[
        str,
        typer.Option(
            help="Folder with one folder of images for each class (FOLDER,names=imagenet if "
            "these are numbers, as in ImageNet-V2), or emoji_classes:size=600."
        ),
    ],
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = 0,
    max_bad_share: MaxBadShare = 0.05,
    output: ScoresFile = None,
) -> None:
    """Compute top-1 and top-5 accuracy of zero-shot classification by class names."""
    from elip_models.pretraining.data import open_classes
    from elip_models.pretraining.tasks.zero_shot import evaluate_zero_shot

    trained, tokenizer = open_trained(model, output, ranks=True)
    with as_config_error("--data", inner="spec"):
        source = open_classes(data, image_size=trained.config.image_size)
    loading = loading_of(batch_size, num_workers, max_bad_share)
    scores = evaluate_zero_shot(trained, tokenizer, source, **loading._asdict())
    Console().print(zero_shot_table(scores))
    write_scores(_as_dict(scores), output)


def _evaluate(
    task: "Task", model: Path, data: str, loading: "Loading", output: Path | None
) -> None:
    from elip_models.pretraining.tasks.registry import read_answers

    model = weights_folder(model)
    trained, tokenizer = open_trained(model, output)
    with as_config_error("--model", inner="spec"):
        _check_task(task, trained)
    with as_config_error("--data", inner="spec"):
        source = task.open(data, image_size=trained.config.image_size)
    scores = task.evaluate(trained, tokenizer, source, loading, read_answers(model))
    Console().print(task_table(scores))
    write_scores(scores.as_dict(), output)


def _check_task(task: "Task", model: "PretrainedModel") -> None:
    fits = hasattr(model, "matching_logits") if task.name == "retrieval" else False
    if model.task != task.name and not fits:
        kind = f"one for {model.task}" if model.task else "a pre-trained one"
        raise ValueError(
            f"expected a model trained by `elip finetune {task.name}`, got {type(model).__name__}, "
            f"{kind}"
        )


def _add_command(name: str) -> None:
    @app.command(name, help=f"Score a model trained by `elip finetune {name}`.")
    def command(
        model: SavedModel,
        data: Annotated[str, typer.Option(help="Data, as data.eval of the task's recipes.")],
        batch_size: BatchSize = 64,
        num_workers: NumWorkers = 0,
        max_bad_share: MaxBadShare = 0.05,
        options: Annotated[
            list[str] | None,
            typer.Option("--set", help="Option of the task, such as candidates=64."),
        ] = None,
        output: ScoresFile = None,
    ) -> None:
        from elip_models.pretraining.tasks.registry import get_task

        with as_config_error("--set"):
            task = get_task(name, **parse_overrides(options or (), "candidates=64"))
        loading = loading_of(batch_size, num_workers, max_bad_share)
        _evaluate(task, model, data, loading, output)


for _name in ("vqa", "entailment", "nlvr2", "captioning", "classification"):
    _add_command(_name)


def _as_dict(scores: "RetrievalScores | ZeroShotScores") -> dict[str, Any]:
    intervals = {name: interval._asdict() for name, interval in scores.intervals.items()}
    return asdict(scores) | {"intervals": intervals}
