"""What a model is judged by: its outputs for images, and measures of these outputs.

A task runs a model, dense or reduced, on some of its images, and returns outputs that are stored.
From stored outputs it computes measures, as rows of totals: one row an image, so that differences
between models are paired by image, and an interval resamples images.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor, nn

from elip_models.api import reduce_
from elip_models.calibration.candidates import Candidates, TowerCandidates
from elip_models.profiling.measure import Step
from elip_models.profiling.workload import shared_copy

Outputs = dict[str, Tensor]
"""What a model returned for images, by name; the first dimension counts the images."""


class Part(NamedTuple):
    """Images of a task, and what two models returned for them.

    Attributes:
        images: the numbers of the images, ascending.
        outputs: of the model that is measured, row i for `images[i]`.
        dense: of the dense model, likewise; the same object where the dense model is measured.
    """

    images: Sequence[int]
    outputs: Outputs
    dense: Outputs


class Measure(NamedTuple):
    """A number between 0 and 1 that is larger for a better model.

    Attributes:
        rows: (n, V) float64, the totals of each image.
        statistic: maps sums over images (R, V) to the measure (R,).
    """

    rows: np.ndarray
    statistic: Callable[[np.ndarray], np.ndarray]


def ratio(totals: np.ndarray) -> np.ndarray:
    """Return (R,) the first total (R, 2) divided by the second: right examples of all examples."""
    return totals[:, 0] / totals[:, 1]


class Task(ABC):
    """A task on images 0 .. `count` - 1, whose outputs can be computed in any order.

    Attributes:
        name: of the option `--task`.
        measures: names of the measures; the first decides, the others are reported.
        least_of_group: the images of each of `groups` that a run needs.
    """

    name: ClassVar[str]
    least_of_group: ClassVar[int] = 1
    measures: tuple[str, ...]

    @property
    @abstractmethod
    def count(self) -> int:
        """Return the number of images, of which each is in one part."""

    def fit(self, model: nn.Module, chosen_on: Sequence[int]) -> None:
        """Fit what the outputs need on the dense model and the images that choose.

        It is called once, before anything else but `count` and `groups`.
        """
        return None

    @abstractmethod
    def outputs(
        self, model: nn.Module, images: Sequence[int], advance: Callable[[int], object]
    ) -> Outputs:
        """Return what the measures need, on the CPU.

        Args:
            model: dense or reduced, in eval mode.
            images: numbers of images, ascending.
            advance: is called with the number of images of each batch.
        """

    @abstractmethod
    def measured(self, chosen_on: Part, held_back: Part | None = None) -> dict[str, Measure]:
        """Return each of `measures` of the images held back, or of the others where it is None.

        What is fitted, is fitted on `chosen_on` alone. Where that is measured itself, each image is
        measured by what was fitted on images of other folds.
        """

    @abstractmethod
    def steps(self, model: nn.Module, images: Sequence[int]) -> dict[str, Step]:
        """Return functions that run the model on a batch of these images, which are timed.

        A task with one such function calls it "". Of several, the first decides.
        """

    def answers(self, images: Sequence[int], outputs: Outputs) -> list[str] | None:
        """Return in words what a model answered for the images, or None if it is no answer.

        Args:
            images: numbers of images.
            outputs: of the model, row i for `images[i]`.
        """
        return None

    def truths(self, images: Sequence[int]) -> list[str] | None:
        """Return in words the right answer for each image, or None if there is none."""
        return None

    def candidates(self, model: nn.Module, *, class_token_only: bool = False) -> Candidates:
        """Return the settings that are tried; those of the image tower, unless overridden."""
        return TowerCandidates(model, class_token_only=class_token_only)

    def reduced(self, model: nn.Module, strategy: Any) -> nn.Module:
        """Return a copy of the dense model with a strategy of a candidate; it shares weights."""
        return reduce_(shared_copy(model), strategy)

    def contents(self) -> dict[str, Any]:
        """Return as plain JSON what the outputs depend on beside the model, in any run."""
        return {}

    def groups(self) -> Sequence[int] | None:
        """Return a number for each image that is equal for images of one class, or None.

        The parts have the same shares of all groups.
        """
        return None
