"""Evaluation during and after training."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from elip_models.pretraining.data import ClassSource, Source
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.registry import family_of
from elip_models.pretraining.tasks.registry import save_answers
from elip_models.pretraining.tasks.retrieval import Retrieval
from elip_models.pretraining.tasks.task import Loading, Progress, TaskScores
from elip_models.pretraining.tasks.zero_shot import ZeroShot
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.training_data import task_of
from elip_models.validation import ConfigError, as_config_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRETRAINING_TASKS = {"retrieval": Retrieval(candidates=0), "zero_shot": ZeroShot()}
VALIDATION = "validation"
"""Name of the evaluation of a downstream task on `data.validation`."""


class Evaluation:
    """The evaluation tasks of a recipe, their data, and the last scores of each task.

    A pre-training recipe evaluates retrieval and zero-shot classification. A fine-tuning recipe
    evaluates its downstream task on `data.eval`, and on `data.validation` if there is one. Data
    that cannot be opened, or a model without features to rank, raises ConfigError.
    """

    def __init__(self, config: RunConfig, image_size: int) -> None:
        self.config = config
        self.answers: tuple[str, ...] | None = None  # the answers that the model can give
        self.scores: dict[str, TaskScores] = {}
        self.sources: dict[str, Source | ClassSource] = {}
        self.task = task_of(config)
        family, data = family_of(config.model.name), config.data
        requested = [name for name in PRETRAINING_TASKS if name in config.report]
        if self.task is None and not family.ranks and (config.eval_every or requested):
            raise ConfigError(
                f"report: expected no {' or '.join(requested) or 'retrieval'}, and eval_every=0, "
                f"for {family.__name__}, which has no features of images and texts alone to rank"
            )
        task = self.task
        if task is None:
            self.evaluations = PRETRAINING_TASKS
            specs = {"eval": ("retrieval", data.eval), "zero_shot": ("zero_shot", data.zero_shot)}
        else:
            self.evaluations = {VALIDATION: task, task.name: task}
            specs = {"validation": (VALIDATION, data.validation), "eval": (task.name, data.eval)}
        for key, (name, spec) in specs.items():
            if spec is not None:
                with as_config_error(f"data.{key}", inner="spec"):
                    opened = self.evaluations[name].open(spec, image_size=image_size)
                    self.sources[name] = opened
        self.at_end = [name for name in self.sources if self.task or name in config.report]

    def due(self, step: int, total_steps: int, steps_per_epoch: float = math.inf) -> list[str]:
        """Return the names of the tasks to evaluate after step `step`."""
        every = self.config.eval_every
        is_due = bool(every) and step % every == 0
        if VALIDATION in self.sources and step < total_steps:
            ends_epoch = step // steps_per_epoch > (step - 1) // steps_per_epoch
            return [VALIDATION] if is_due or (not every and ends_epoch) else []
        if is_due:
            return list(self.sources)
        return self.at_end if step == total_steps else []

    def save(
        self, model: PretrainedModel, tokenizer: "PreTrainedTokenizerBase", folder: Path
    ) -> None:
        """Write a model with its tokenizer and, for some tasks, its answers."""
        model.save_pretrained(folder, tokenizer=tokenizer)
        if self.answers is not None:
            save_answers(folder, self.answers)

    def run(
        self,
        task: str,
        model: PretrainedModel,
        tokenizer: "PreTrainedTokenizerBase",
        progress: Progress,
    ) -> TaskScores:
        """Evaluate one task, store its scores and return them."""
        data, source = self.config.data, self.sources[task]
        loading = Loading(
            self.config.optim.batch_size, data.num_workers, data.max_bad_share, progress
        )
        scores = self.evaluations[task].evaluate(model, tokenizer, source, loading, self.answers)
        is_recall = self.task is None and task == "retrieval"  # its metrics need no prefix in logs
        self.scores[task] = replace(scores, task="" if is_recall else task)
        return self.scores[task]
