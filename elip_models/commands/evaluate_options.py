"""Options and steps that the commands `elip eval ..` share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from elip_models.validation import as_config_error, check_output, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.models.base import PretrainedModel
    from elip_models.pretraining.tasks.task import Loading

SavedModel = Annotated[
    Path, typer.Option(help="Folder of a saved model and its tokenizer, or of its run.")
]
BatchSize = Annotated[int, typer.Option(min=1, max=2**20, help="Images in a forward pass.")]
NumWorkers = Annotated[
    int, typer.Option(min=0, max=1024, help="Number of processes that load images.")
]
MaxBadShare = Annotated[
    float, typer.Option(min=0, max=1, help="Largest share of unreadable samples.")
]
ScoresFile = Annotated[Path | None, typer.Option(help="JSON file for the scores.")]


def loading_of(batch_size: int, num_workers: int, max_bad_share: float) -> "Loading":
    """Return the options of data loading; raise ConfigError for too many processes."""
    from elip_models.pretraining.data.loader import worker_options
    from elip_models.pretraining.tasks.task import Loading

    with as_config_error("--num-workers"):
        worker_options(num_workers)
    return Loading(batch_size, num_workers, max_bad_share)


def open_trained(
    model: Path, output: Path | None, *, ranks: bool = False
) -> "tuple[PretrainedModel, PreTrainedTokenizerBase]":
    """Load a saved model and its tokenizer, on a GPU if there is one."""
    check_output("--output", output)
    model = weights_folder(model)
    import torch

    from elip_models.pretraining.data import load_tokenizer
    from elip_models.pretraining.models.registry import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with as_config_error("--model", inner="spec"):
        trained = load_model(model).to(device)
        if ranks and not trained.ranks:
            raise ValueError(
                f"expected a model with features to rank, got {type(trained).__name__}, which has "
                "none of images and texts alone"
            )
        return trained, load_tokenizer(str(model))


def weights_folder(model: Path) -> Path:
    """Return the folder of the weights to evaluate; print which they are if `model` is a run."""
    from elip_models.pretraining.training.selection import selected_folder

    folder, selection = selected_folder(model)
    if folder != model:
        line = f"evaluating {folder}" + (f", weights of {selection}" if selection else "")
        Console().print(escape(line), soft_wrap=True, highlight=False)
    return folder


def write_scores(scores: dict[str, Any], output: Path | None) -> None:
    """Write the scores as JSON, if `output` is a file."""
    if output is not None:
        from elip_models.saving.files import write_json

        write_json(output, scores)
