"""The weights with the best score on the validation split, which are the result of a run.

    best/                  model and tokenizer, as in `model/`
    best/selection.json    the metrics, their mean on the validation split, and the step

The first of equal scores is kept.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.registry import load_model
from elip_models.pretraining.tasks.task import Task, TaskScores
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.saving.files import publish, read_object, unfinished, write_json
from elip_models.validation import ConfigError, did_you_mean

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


class BestWeights:
    """The selected weights of a run, in `folder`; `selection` is None until there are any."""

    def __init__(self, config: RunConfig, task: Task | None, folder: Path) -> None:
        select = config.eval.select or ()
        self.metrics = (select,) if isinstance(select, str) else select
        for name in self.metrics:
            if task is not None and name not in task.metrics:
                raise ConfigError(
                    f"eval.select: expected some of {', '.join(task.metrics)}, the metrics of "
                    f"{task.name}, got {json.dumps(name)}{did_you_mean(name, task.metrics)}"
                )
        self.folder = folder
        self.selection = _read(folder) if self.metrics else None

    def update(self, scores: TaskScores, step: int, save: Callable[[Path], object]) -> None:
        """Call `save(folder)` and store what it writes if the scores are the best so far."""
        if not self.metrics:
            return
        value = fmean(scores.scores[name].mean for name in self.metrics)
        if not value > (self.selection.value if self.selection else -math.inf):
            return
        self.selection = Selection(self.metrics, value, step)
        save(unfinished(self.folder))
        write_json(unfinished(self.folder) / RECORD, asdict(self.selection))
        publish(self.folder)

    def load(self, device: torch.device) -> PretrainedModel | None:
        """Return the selected model in eval mode; None if none was selected."""
        return load_model(self.folder).to(device).eval() if self.selection else None


def selected_folder(folder: Path) -> tuple[Path, Selection | None]:
    """Return the folder of the model to evaluate, and how it was selected.

    In the folder of a run, this is `best` if the run selected weights, else `model`. The folder of
    a model is returned as it is.
    """
    if (folder / "config.json").is_file() or not (folder / "model" / "config.json").is_file():
        return folder, _read(folder)
    best = folder / "best"
    return (best, _read(best)) if best.is_dir() else (folder / "model", None)


def _read(folder: Path) -> Selection | None:
    if not (folder / RECORD).is_file():
        return None
    record = read_object(folder / RECORD)
    return Selection(tuple(record["metrics"]), record["value"], record["step"])
