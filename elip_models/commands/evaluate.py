"""The command `elip eval TASK`."""

from pathlib import Path
from typing import Annotated

from elip_models.commands.image_folder import as_option_error, listing
from elip_models.pretraining.training.recipe import parse_overrides
from elip_models.validation import as_config_error, check_output, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape


def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="retrieval: recall@1/5/10. zero-shot: top-1 and top-5 accuracy by class names. "
            "vqa, entailment, nlvr2, captioning, classification: a model of `elip finetune TASK`.",
        ),
    ],
    model: Annotated[
        Path, typer.Option(help="Folder of a saved model and its tokenizer, or of its run.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="JSON list, tar shards, a folder of classes (FOLDER,names=imagenet if these are "
            "numbers), files of a task, or built-in data: emoji_scenes:seed=1,size=500 "
            "(retrieval, captioning), emoji_classes, emoji_questions, .."
        ),
    ],
    batch_size: Annotated[
        int, typer.Option(min=1, max=2**20, help="Images in a forward pass.")
    ] = 64,
    num_workers: Annotated[
        int, typer.Option(min=0, max=1024, help="Number of processes that load images.")
    ] = 0,
    max_bad_share: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of unreadable samples.")
    ] = 0.05,
    rerank: Annotated[
        int,
        typer.Option(min=0, max=2**20, help="retrieval: number of candidates that ITM re-ranks."),
    ] = 0,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another option of the task, such as candidates=64."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
) -> None:
    """Score a trained model."""
    check_output("--output", output)
    import torch

    from elip_models.pretraining.models.registry import load_model
    from elip_models.pretraining.tasks.registry import EVALUATIONS, get_task, read_answers
    from elip_models.pretraining.tasks.tables import score_table
    from elip_models.pretraining.tasks.task import Loading
    from elip_models.pretraining.training.evaluation import selected_folder
    from elip_models.saving.files import write_json

    name = task.replace("-", "_")
    settings = {"candidates": rerank} if rerank or name == "retrieval" else {}
    settings |= parse_overrides(options or (), "candidates=64")
    with as_config_error(f"eval {task}", inner="task_options"):
        evaluation = get_task(name, EVALUATIONS, **settings)
    folder, selection = selected_folder(model)
    if folder != model:
        line = f"evaluating {folder}" + (f", weights of {selection}" if selection else "")
        Console().print(escape(line), soft_wrap=True, highlight=False)
    with as_config_error("--model", inner="spec"):
        trained = load_model(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = trained.load_tokenizer(str(folder))
    with as_option_error(evaluate, guided="--set guided"):
        evaluation.check(trained)
    with listing(data), as_config_error("--data", inner="spec"):
        source = evaluation.open(data, image_size=trained.config.image_size)
    loading = Loading(batch_size, num_workers, max_bad_share)
    scores = evaluation.evaluate(trained, tokenizer, source, loading, read_answers(folder))
    Console().print(score_table(scores))
    if output is not None:
        write_json(output, scores.as_dict())
