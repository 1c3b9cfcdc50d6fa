"""The names of the downstream tasks, and the stored answers of fine-tuned models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from elip_models.pretraining.tasks.captioning import Captioning
from elip_models.pretraining.tasks.class_tasks import NLVR2, Classification, Entailment
from elip_models.pretraining.tasks.retrieval import Retrieval
from elip_models.pretraining.tasks.task import EvaluationTask, Task
from elip_models.pretraining.tasks.vqa import VQA
from elip_models.pretraining.tasks.zero_shot import ZeroShot
from elip_models.saving.files import write_json
from elip_models.validation import did_you_mean

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Retrieval, VQA, Entailment, NLVR2, Captioning, Classification)
}
"""Tasks of `elip finetune`."""
EVALUATIONS: dict[str, type[EvaluationTask]] = TASKS | {ZeroShot.name: ZeroShot}
"""Tasks of `elip eval`."""


def get_task(
    name: str, kinds: Mapping[str, type[EvaluationTask]] = TASKS, **options: Any
) -> EvaluationTask:
    """Return the task of `kinds` called `name`, with the given settings instead of its defaults."""
    if name not in kinds:
        raise ValueError(
            f"task: expected one of {', '.join(kinds)}, got {name!r}{did_you_mean(name, kinds)}"
        )
    known = [field.name for field in fields(kinds[name])]
    for option in options.keys() - {*known}:
        raise ValueError(
            f"task_options: expected some of {', '.join(known) or 'none'}, got {option!r}"
            f"{did_you_mean(option, known)}"
        )
    return kinds[name](**options)


ANSWERS = "answers.json"


def save_answers(folder: Path, answers: Sequence[str]) -> None:
    """Write all possible answers of a model beside it, in the order of its outputs."""
    write_json(folder / ANSWERS, [*answers])


def read_answers(folder: Path) -> tuple[str, ...] | None:
    """Return the answers that `save_answers` wrote, or None."""
    path = folder / ANSWERS
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
