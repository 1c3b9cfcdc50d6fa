"""Evaluation during and after training, and the weights that are best on the validation split.

    best/                  model and tokenizer, as in `model/`
    best/selection.json    the metrics, their mean on the validation split, and the step

The first of equal scores is kept.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from elip_models.pretraining.data import ClassSource, Source
from elip_models.pretraining.models.base import WRITTEN, PretrainedModel
from elip_models.pretraining.models.registry import family_of, load_model
from elip_models.pretraining.tasks.registry import save_answers
from elip_models.pretraining.tasks.retrieval import Retrieval
from elip_models.pretraining.tasks.task import Loading, Progress, TaskScores
from elip_models.pretraining.tasks.zero_shot import ZeroShot
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.training_data import task_of
from elip_models.saving.files import read_object, write_json
from elip_models.saving.saved_folder import recover, saved_folder
from elip_models.validation import ConfigError, as_config_error, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRETRAINING_TASKS = {"retrieval": Retrieval(candidates=0), "zero_shot": ZeroShot()}
VALIDATION = "validation"
"""Name of the evaluation of a downstream task on `data.validation`."""
RECORD = "selection.json"


@dataclass(frozen=True)
class Selection:
    """Which weights of a run were selected."""

    metrics: tuple[str, ...]
    value: float  # mean of the metrics on `data.validation`
    step: int

    def __str__(self) -> str:
        return (
            f"step {self.step}, the best on data.validation: {' + '.join(self.metrics)} "
            f"{100 * self.value:.1f}%"
        )


class Evaluation:
    """The evaluation tasks of a recipe, their data, and the last scores of each task.

    A pre-training recipe evaluates retrieval and zero-shot classification. A fine-tuning recipe
    evaluates its downstream task on `data.eval`, and on `data.validation` if there is one. With
    `eval.select`, the weights that are best on the latter are stored in the folder `best`. Data
    that cannot be opened, or a model without features to rank, raises ConfigError.
    """

    def __init__(self, config: RunConfig, image_size: int, best: Path) -> None:
        self.config, self.best = config, best
        self.answers: tuple[str, ...] | None = None  # the answers that the model can give
        self.scores: dict[str, TaskScores] = {}
        self.sources: dict[str, Source | ClassSource] = {}
        self.task, data = task_of(config), config.data
        if self.task is None:
            self._check_ranking()
            self.evaluations = PRETRAINING_TASKS
            specs = {"eval": ("retrieval", data.eval), "zero_shot": ("zero_shot", data.zero_shot)}
        else:
            self.evaluations = {VALIDATION: self.task, self.task.name: self.task}
            specs = {"validation": (VALIDATION, data.validation)}
            specs["eval"] = (self.task.name, data.eval)
        for key, (name, spec) in specs.items():
            if spec is not None:
                with as_config_error(f"data.{key}", inner="spec"):
                    opened = self.evaluations[name].open(spec, image_size=image_size)
                    self.sources[name] = opened
        self.at_end = [name for name in self.sources if self.task or name in config.report]
        select = config.eval.select or ()
        self.metrics = (select,) if isinstance(select, str) else select
        self._check_metrics()
        self.selection = _read_selection(best) if self.metrics else None

    def _check_ranking(self) -> None:
        family = family_of(self.config.model.name)
        requested = [name for name in PRETRAINING_TASKS if name in self.config.report]
        if not family.ranks and (self.config.eval_every or requested):
            raise ConfigError(
                f"report: expected no {' or '.join(requested) or 'retrieval'}, and eval_every=0, "
                f"for {family.__name__}, which has no features of images and texts alone to rank"
            )

    def _check_metrics(self) -> None:
        for name in self.metrics:
            known = self.task.metrics if self.task else ()
            if name not in known:
                raise ConfigError(
                    f"eval.select: expected some of {', '.join(known)}, the metrics of "
                    f"{self.config.task}, got {json.dumps(name)}{did_you_mean(name, known)}"
                )

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
        with saved_folder(folder, WRITTEN) as new:
            model.save_pretrained(new, tokenizer=tokenizer)
            if self.answers is not None:
                save_answers(new, self.answers)

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

    def select(
        self, model: PretrainedModel, tokenizer: "PreTrainedTokenizerBase", step: int
    ) -> None:
        """Store the model in `best` if its scores on the validation split are the best so far."""
        if not self.metrics:
            return
        scores = self.scores[VALIDATION].scores
        value = fmean(scores[name].mean for name in self.metrics)
        if value > (self.selection.value if self.selection else -math.inf):  # never NaN
            self.selection = Selection(self.metrics, value, step)
            with saved_folder(self.best, WRITTEN) as new:
                self.save(model, tokenizer, new)
                write_json(new / RECORD, asdict(self.selection))

    def selected_model(self, device: torch.device) -> PretrainedModel | None:
        """Return the model in `best` in eval mode; None if none was selected."""
        return load_model(self.best).to(device).eval() if self.selection else None


def selected_folder(folder: Path) -> tuple[Path, Selection | None]:
    """Return the folder of the model to evaluate, and how it was selected.

    In the folder of a run, this is `best` if the run selected weights, else `model`. The folder of
    a model is returned as it is.
    """
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file():
        has_best = (folder / "best").is_dir() or recover(folder / "best")
        folder = folder / ("best" if has_best else "model")
    return folder, _read_selection(folder)


def _read_selection(folder: Path) -> Selection | None:
    if not (folder / RECORD).is_file():
        return None
    record = read_object(folder / RECORD)
    return Selection(tuple(record["metrics"]), record["value"], record["step"])
