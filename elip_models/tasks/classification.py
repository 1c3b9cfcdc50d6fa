"""Image classification: a linear probe of a tower, or all of it fine-tuned."""

from dataclasses import dataclass
from typing import ClassVar

from elip_models.data import ExampleSource, open_examples
from elip_models.tasks.class_task import ClassTask


@dataclass(frozen=True)
class Classification(ClassTask):
    """The classes of the source."""

    name: ClassVar[str] = "classification"
    reads_text: ClassVar[bool] = False

    def open(self, spec: str, *, image_size: int) -> ExampleSource:
        return open_examples(self.name, spec, image_size=image_size)
