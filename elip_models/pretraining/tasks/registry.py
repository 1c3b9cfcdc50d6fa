"""The names of the downstream tasks, and the stored answers of fine-tuned models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elip_models.pretraining.tasks.captioning import Captioning
from elip_models.pretraining.tasks.class_tasks import NLVR2, Classification, Entailment
from elip_models.pretraining.tasks.retrieval_task import Retrieval
from elip_models.pretraining.tasks.task import Task
from elip_models.pretraining.tasks.vqa import VQA
from elip_models.saving.files import write_file
from elip_models.validation import did_you_mean

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Retrieval, VQA, Entailment, NLVR2, Captioning, Classification)
}


def get_task(name: str, **options: Any) -> Task:
    """Return the task called `name`, with the given settings instead of its defaults."""
    if name not in TASKS:
        raise ValueError(
            f"task: expected one of {', '.join(TASKS)}, got {name!r}{did_you_mean(name, TASKS)}"
        )
    known = TASKS[name].__dataclass_fields__
    for option in options:
        if option not in known:
            raise ValueError(
                f"task_options: expected some of {', '.join(known) or 'none'}, got {option!r}"
                f"{did_you_mean(option, known)}"
            )
    return TASKS[name](**options)


ANSWERS = "answers.json"


def save_answers(folder: Path, answers: Sequence[str]) -> None:
    """Write all possible answers of a model beside it, in the order of its outputs."""
    write_file(folder / ANSWERS, (json.dumps([*answers]) + "\n").encode())


def read_answers(folder: Path) -> tuple[str, ...] | None:
    """Return the answers that `save_answers` wrote, or None."""
    path = folder / ANSWERS
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
