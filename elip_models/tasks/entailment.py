"""Visual entailment: does a picture entail a hypothesis, contradict it, or neither.

Source: SNLI-VE (Xie et al., 2019).
"""

from dataclasses import dataclass
from typing import ClassVar

from elip_models.tasks.class_task import ClassTask


@dataclass(frozen=True)
class Entailment(ClassTask):
    """Three classes."""

    name: ClassVar[str] = "entailment"
