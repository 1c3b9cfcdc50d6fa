"""The result of a finished run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from elip_models.data import Source
from elip_models.tasks.retrieval import RetrievalScores
from elip_models.tasks.task import TaskScores
from elip_models.tasks.zero_shot import ZeroShotScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run.

    Attributes:
        model: The trained model in eval mode, without wrappers. After a sharded run it is whole on
            the main process and sharded on the others.
        tokenizer: The tokenizer of the model.
        eval_source: The opened `data.eval`; None if the recipe has none.
        output_dir: Folder of the run.
        step: Number of optimiser steps.
        loss: Loss of the last step.
        scores: Scores of the last retrieval evaluation, if any.
        zero_shot: Scores of the last zero-shot classification, if any.
        task_scores: Scores of the downstream task of a fine-tuning run.
        skipped: A summary of the samples that could not be read.
        is_main_process: False on ranks above 0 of `torchrun`.
    """

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    eval_source: Source | None
    output_dir: Path
    step: int
    loss: float
    scores: RetrievalScores | None
    zero_shot: ZeroShotScores | None
    task_scores: TaskScores | None
    skipped: str
    is_main_process: bool
