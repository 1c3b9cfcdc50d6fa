"""Image classification: a linear probe of a tower, or all of it fine-tuned."""

from dataclasses import dataclass
from typing import ClassVar

from elip_models.tasks.class_task import ClassTask


@dataclass(frozen=True)
class Classification(ClassTask):
    """The classes of the source."""

    name: ClassVar[str] = "classification"
    reads_text: ClassVar[bool] = False
