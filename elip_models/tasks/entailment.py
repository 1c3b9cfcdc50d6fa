"""Visual entailment: an image entails a hypothesis, contradicts it, or neither.

Source: SNLI-VE (Xie et al., 2019).
"""

from dataclasses import dataclass
from typing import ClassVar

from elip_models.tasks.class_task import ClassTask


@dataclass(frozen=True)
class Entailment(ClassTask):
    """Visual entailment with three labels."""

    name: ClassVar[str] = "entailment"
