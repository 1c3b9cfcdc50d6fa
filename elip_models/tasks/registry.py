"""get_task, the names of the downstream tasks, and the answers that a model of one learned."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elip_models.models.io.files import write_file
from elip_models.tasks.captioning import Captioning
from elip_models.tasks.classification import Classification
from elip_models.tasks.entailment import Entailment
from elip_models.tasks.matching import Retrieval
from elip_models.tasks.nlvr2 import NLVR2
from elip_models.tasks.task import Task
from elip_models.tasks.vqa import VQA
from elip_models.validation import did_you_mean

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Retrieval, VQA, Entailment, NLVR2, Captioning, Classification)
}


def get_task(name: str, **options: Any) -> Task:
    """The task of that name, with other settings than its own.

    Raises:
        TypeError: a setting of another type.
        ValueError: an unknown task or setting, with the nearest known one, or one out of range.
    """
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
    """Write, beside a model, all that it can answer, in the order of its outputs."""
    write_file(folder / ANSWERS, (json.dumps([*answers]) + "\n").encode())


def read_answers(folder: Path) -> tuple[str, ...] | None:
    """What `save_answers` wrote; None where it did not."""
    path = folder / ANSWERS
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
