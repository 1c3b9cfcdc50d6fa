"""The command `elip eval TASK`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from elip_models.pretraining.training.recipe import parse_overrides
from elip_models.validation import ConfigError, as_config_error, check_output, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.models.base import PretrainedModel


SavedModel = Annotated[
    Path, typer.Option(help="Folder of a saved model and its tokenizer, or of its run.")
]


def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="retrieval: recall@1/5/10. zero-shot: top-1 and top-5 accuracy by class names. "
            "composition: Winoground, ARO, SugarCrepe. grounding: Grad-CAM of expressions. vqa, "
            "entailment, nlvr2, captioning, classification: a model of `elip finetune TASK`.",
        ),
    ],
    model: SavedModel,
    data: Annotated[
        str,
        typer.Option(
            help="JSON list, tar shards, a folder of classes (FOLDER,names=imagenet if these are "
            "numbers), files of a benchmark, or built-in data: emoji_scenes:seed=1,size=500 "
            "(retrieval, captioning), emoji_classes, emoji_composition, emoji_grounding, .."
        ),
    ],
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, max=2**20, help="Images in a forward pass; default: 64, grounding 32."),
    ] = None,
    num_workers: Annotated[
        int, typer.Option(min=0, max=1024, help="Number of processes that load images.")
    ] = 0,
    max_bad_share: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of unreadable samples.")
    ] = 0.05,
    rerank: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**20, help="retrieval: number of candidates that ITM re-ranks; default: 0."
        ),
    ] = None,
    itm: Annotated[
        bool,
        typer.Option(
            "--itm", help="composition: score by ITM, not by features; always on for METER."
        ),
    ] = False,
    guided: Annotated[
        bool,
        typer.Option(
            "--guided",
            help="composition, grounding, retrieval with --rerank: let each text guide the "
            "reduction of the image that it is scored against.",
        ),
    ] = False,
    layer: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="grounding: layer with cross attention, from 1; default: half of them.",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another option of the task, such as candidates=64."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
) -> None:
    """Score a trained model."""
    check_output("--output", output)
    from elip_models.pretraining.data.loader import worker_options
    from elip_models.pretraining.tasks.registry import EVALUATIONS, get_task, read_answers
    from elip_models.pretraining.tasks.tables import score_table
    from elip_models.pretraining.tasks.task import Loading
    from elip_models.saving.files import write_json

    name = task.replace("-", "_")
    named = {"candidates": rerank, "itm": itm, "guided": guided, "layer": layer}
    settings = {"candidates": 0} if name == "retrieval" else {}
    settings |= {option: value for option, value in named.items() if value}
    settings |= parse_overrides(options or (), "candidates=64")
    with as_config_error(f"eval {task}", inner="task_options"):
        evaluation = get_task(name, EVALUATIONS, **settings)
    with as_config_error("--num-workers"):
        worker_options(num_workers)
    loading = Loading(batch_size or evaluation.batch_size, num_workers, max_bad_share)
    folder = weights_folder(model)
    trained, tokenizer = open_trained(folder)
    try:
        evaluation.check(trained)
    except (TypeError, ValueError) as error:  # its text begins with "model" or "layer"
        raise ConfigError(f"--{error}") from error
    with as_config_error("--data", inner="spec"):
        source = evaluation.open(data, image_size=trained.config.image_size)
    scores = evaluation.evaluate(trained, tokenizer, source, loading, read_answers(folder))
    Console().print(score_table(scores))
    if output is not None:
        write_json(output, scores.as_dict())


def weights_folder(model: Path) -> Path:
    """Return the folder of the weights to evaluate; print which they are if `model` is a run."""
    from elip_models.pretraining.training.evaluation import selected_folder

    folder, selection = selected_folder(model)
    if folder != model:
        line = f"evaluating {folder}" + (f", weights of {selection}" if selection else "")
        Console().print(escape(line), soft_wrap=True, highlight=False)
    return folder


def open_trained(folder: Path) -> "tuple[PretrainedModel, PreTrainedTokenizerBase]":
    """Load a saved model and its tokenizer, on a GPU if there is one."""
    import torch

    from elip_models.pretraining.data import load_tokenizer
    from elip_models.pretraining.models.registry import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with as_config_error("--model", inner="spec"):
        return load_model(folder).to(device), load_tokenizer(str(folder))
