"""The result of a finished run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from elip_models.pretraining.data import Source
from elip_models.pretraining.tasks.task import TaskScores
from elip_models.pretraining.training.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run, with the trained model in eval mode, without wrappers.

    With `eval.select`, model and scores are those of the selected step, see `selection`. After a
    sharded run the model is whole on the main process and sharded on the others. The scores are
    those of the last evaluation, if any.
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
    last_scores: TaskScores | None  # of the weights of the last step
    skipped: str  # a summary of the samples that could not be read
    is_main_process: bool  # False on ranks above 0 of `torchrun`
