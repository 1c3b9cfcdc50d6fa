"""The result of a run, and what `elip train` prints before, during and after it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from elip_models.integrations.peft.adapt import trainable_counts
from elip_models.pretraining.data import Source
from elip_models.pretraining.data.streams import redacted
from elip_models.pretraining.tasks.tables import score_table
from elip_models.pretraining.tasks.task import TaskScores
from elip_models.pretraining.training.evaluation import Selection
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.run_folder import as_write_error
from elip_models.pretraining.training.training_data import meta_model
from elip_models.saving.files import write_json
from elip_models.strategies.summary import Summary
from elip_models.validation import require_extra

with require_extra("elip_models.pretraining.training"):
    from rich.console import Console
    from rich.markup import escape
    from rich.panel import Panel
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run, with the trained model in eval mode, without wrappers.

    With `eval.select`, model and scores are those of the selected step. After a sharded run the
    model is whole on the main process and sharded on the others. The scores are those of the last
    evaluation, if any.
    """

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    eval_source: Source | None  # the opened `data.eval`
    output_dir: Path
    step: int  # number of optimiser steps
    loss: float  # of the last step
    scores: TaskScores | None
    zero_shot: TaskScores | None
    task_scores: TaskScores | None  # of a fine-tuning run
    selection: Selection | None  # of these weights on `data.validation`
    skipped: str  # a summary of the samples that could not be read
    is_main_process: bool  # False on ranks above 0 of `torchrun`


def print_plan(config: RunConfig, console: Console, *, device: str, num_processes: int) -> None:
    """Print model, reduction, data, length and folder of a run, before it reads data."""
    model, data, optim = meta_model(config), config.data, config.optim
    length = f"{optim.steps} steps" if optim.steps else f"{optim.epochs:g} epochs"
    images = optim.batch_size * optim.grad_accumulation * num_processes
    processes = f"{num_processes} processes on {device}" if num_processes > 1 else device
    rows = {
        "model": f"{config.model.name}, about {trainable_counts(model)[1] / 1e6:.1f} M parameters",
        "reduction": _costs(Summary.of(model.tower, model.reduction, is_whole=True)),
        "training data": _specification(data.train),
        "evaluation data": _specification(data.eval or "none"),
        "length": f"{length}, {images} images per step, on {processes}",
        "folder": config.output_dir,
    }
    plan = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        plan.add_row(name, escape(value))
    console.print(Panel(plan, title=escape(config.name), expand=False))


def _costs(summary: Summary) -> str:
    """Return the line of a summary with its FLOPs in training, and why they exceed those of dense.

    Only a scorer that runs layers for the scores alone, such as the paper's, exceeds them.
    """
    costs = f"{summary.line} in inference, {summary.training_flops:.2f} in training"
    scorer = getattr(summary.strategy, "scorer", None)
    if scorer is None or summary.forward_flops <= 1:
        return costs
    return f"{costs}; the scorer {scorer!r} runs layers twice, the first time without gradient"


def _specification(spec: str | dict | tuple[str, ...]) -> str:
    shown = redacted(spec if isinstance(spec, tuple) else [spec])
    return f"{', '.join(map(str, shown)):.200}"


def progress_bar(console: Console) -> Progress:
    """Return bars, shown on a terminal only; `add_task` takes what a bar counts as `unit`."""
    counts = TextColumn("{task.fields[unit]}"), MofNCompleteColumn(), BarColumn()
    left = TimeRemainingColumn(), TextColumn("left")
    columns = (*counts, TextColumn("{task.description}"), *left)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def print_summary(config: RunConfig, result: TrainResult, console: Console) -> None:
    """Write the reports that `config.report` names, then print steps, loss, scores and files."""
    names = ("model", *(["best"] if result.selection else []), "metrics.jsonl")
    files = [result.output_dir / name for name in names]
    with as_write_error(result.output_dir):
        of_task = config.task is not None
        files += _write_scores(result) if of_task else _write_reports(config, result, console)
    summary = Table.grid(padding=(0, 2))
    summary.add_row("steps", str(result.step))
    summary.add_row("loss", f"{result.loss:.4f}")
    summary.add_row("skipped", escape(result.skipped))
    for name, scores in (
        ("retrieval", result.scores),
        ("zero-shot", result.zero_shot),
        (config.task, result.task_scores),
    ):
        if scores is not None:
            summary.add_row(name, score_table(scores))
    if result.selection is not None:
        summary.add_row("weights", escape(str(result.selection)))
    summary.add_row("files", escape("\n".join(map(str, files))))
    console.print(Panel(summary, title=escape(config.name), expand=False))


def _write_reports(config: RunConfig, result: TrainResult, console: Console) -> Iterator[Path]:
    """Write the time of the image tower and the picture of a pre-trained model."""
    from elip_models.pretraining.training.report import draw_kept_tokens, time_tower

    model, folder = result.model, result.output_dir
    if "timing" in config.report:
        images = config.optim.batch_size // config.optim.batch_slices
        yield time_tower(model, folder / "timing.json", console, images)
    if "picture" in config.report:
        console.print("drawing kept_tokens.png")
        path = folder / "kept_tokens.png"
        yield draw_kept_tokens(model, result.tokenizer, result.eval_source, path)


def _write_scores(result: TrainResult) -> Iterator[Path]:
    """Write the scores of a fine-tuned model."""
    scores, folder = result.task_scores, result.output_dir
    if scores is None:
        return
    content = scores.as_dict()
    if result.selection is not None:
        content["selection"] = asdict(result.selection)
    write_json(folder / "scores.json", content)
    yield folder / "scores.json"
