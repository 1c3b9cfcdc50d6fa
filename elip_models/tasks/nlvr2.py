"""NLVR2: whether a statement is true of two images.

Source: NLVR2 (Suhr et al., 2019).
"""

from dataclasses import dataclass
from typing import ClassVar

from elip_models.tasks.class_task import ClassTask


@dataclass(frozen=True)
class NLVR2(ClassTask):
    """Statements that are true or false; an example has two images."""

    name: ClassVar[str] = "nlvr2"
