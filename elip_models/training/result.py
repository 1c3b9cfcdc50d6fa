"""What a run leaves in memory."""

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
    """What a finished run leaves in memory.

    Args:
        model: trained, in eval mode, without the wrappers of training. Of a sharded run it is whole
            on the main process, and on the others sharded.
        tokenizer: of the model.
        eval_source: `data.eval`, opened; None where the recipe names none.
        output_dir: folder of the run.
        step: optimiser steps done.
        loss: of the last step.
        scores: of the last retrieval; None where there was none.
        zero_shot: of the last zero-shot classification; None where there was none.
        task_scores: of the downstream task that the run fine-tunes for; None where there is none.
        skipped: in words, the samples that could not be read.
        is_main_process: False on the other ranks of `torchrun`.
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
