"""Image classification with a linear probe or a fully fine-tuned image tower."""

from dataclasses import dataclass
from typing import ClassVar

from elip_models.tasks.class_task import ClassTask


@dataclass(frozen=True)
class Classification(ClassTask):
    """Classification into the classes of the source."""

    name: ClassVar[str] = "classification"
    reads_text: ClassVar[bool] = False
