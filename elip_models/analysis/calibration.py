"""The result of `calibrate`: the settings that were tried, and the choice among them."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from elip_models.intervals import Interval
from elip_models.profiling.measure import no_gain
from elip_models.saving.files import write_json
from elip_models.strategies.serialization import settings_of
from elip_models.strategies.strategy import Strategy
from elip_models.validation import shortened

DENSE = "dense"
TIME_NOISE = 0.03  # of the dense time


class Trial(NamedTuple):
    """A setting that was tried.

    Attributes:
        strategy: the strategy, at this setting.
        flops: its share of the dense tower's FLOPs, scoring included.
        loss: the mean loss over the images, with its 95% confidence interval.
        time: its share of the dense time of a batch.
    """

    strategy: Strategy
    flops: float
    loss: Interval
    time: float | None = None

    @property
    def label(self) -> str:
        """Return the strategy as text, without the settings of its class and of its strength."""
        strategy = self.strategy
        changed = (
            f"{option.name}={getattr(strategy, option.name)}".lower()
            for option in fields(strategy)
            if option.name not in (strategy.keep_field, "without_text")
            and getattr(strategy, option.name) != option.default
        )
        settings = ",".join(changed)
        return f"{strategy.name}:{settings}" if settings else strategy.name


@dataclass(frozen=True)
class Calibration:
    """The settings that were tried, and the cheapest one within the tolerance.

    Attributes:
        metric: 'cosine', 'neighbours', or the name of the caller's function.
        tolerance: the largest mean loss.
        images: the number of images.
        trials: the settings, in the order in which they were tried.
        refused: strategies that cannot reduce this model, with the reason.
        measured_on: the device, the batch size and the threads of the times.
        dense_accuracy: with labels, the top-1 accuracy of the probe on dense features.
    """

    metric: str
    tolerance: float
    images: int
    trials: tuple[Trial, ...]
    refused: dict[str, str] = field(default_factory=dict)
    measured_on: dict[str, Any] = field(default_factory=dict)
    dense_accuracy: float | None = None

    @property
    def chosen(self) -> Trial | None:
        """The fastest setting within the tolerance, None if there is none.

        Of settings whose times differ by less than 0.03 of dense, it is the one of fewest FLOPs.
        """
        within = [trial for trial in self.trials if trial.loss.high <= self.tolerance]
        times = [trial.time for trial in within if trial.time is not None]
        if times:
            within = [trial for trial in within if trial.time <= min(times) + TIME_NOISE]
        return min(within, key=lambda trial: trial.flops, default=None)

    def sentence(self) -> str:
        """Return the result as one sentence."""
        if self.chosen is None:
            if not self.trials:
                return "No strategy can reduce this model."
            nearest = min(self.trials, key=lambda trial: trial.loss.high)
            return (
                f"No setting is within {self.tolerance:g} on these {self.images} images: the "
                f"nearest is {nearest.label} at {nearest.flops:.2f} of the dense FLOPs, with a "
                f"mean loss of {_interval(nearest.loss)}."
            )
        best = self.chosen
        gain = ""
        if best.time is not None:
            gain = f" and {best.time:.2f} of the dense time"
            gain += ", which is no gain on this machine" if no_gain(best.time) else ""
        return (
            f"{best.label} at {best.flops:.2f} of the dense FLOPs{gain} has a mean loss of "
            f"{_interval(best.loss)}; of {len(self.trials)} settings that were tried, it is the "
            f"cheapest within {self.tolerance:g} on these {self.images} images."
        )

    def __str__(self) -> str:
        rows = [("strategy", "FLOPs", "time", f"loss ({self.metric}), 95% CI", "within")]
        rows.append((DENSE, "1.00", "1.00", "0", "yes"))
        for trial in sorted(self.trials, key=lambda trial: (-trial.flops, trial.loss.mean)):
            time = "" if trial.time is None else f"{trial.time:.2f}"
            within = "yes" if trial.loss.high <= self.tolerance else "no"
            rows.append((trial.label, f"{trial.flops:.2f}", time, _interval(trial.loss), within))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        left_out = (f"{name}: {reason}" for name, reason in self.refused.items())
        accuracy = () if self.dense_accuracy is None else (self._accuracy(),)
        return "\n".join((*lines, *accuracy, *left_out, self.sentence()))

    def _accuracy(self) -> str:
        return f"The probe classifies {self.dense_accuracy:.1%} of the images by dense features."

    def save(self, path: str | Path) -> None:
        """Write the choice as a file for `reduce_(model, path)`, with all that was tried.

        Raises:
            ValueError: no setting is within the tolerance, or the name does not end in .json.
        """
        if self.chosen is None:
            raise ValueError(f"calibration: expected a choice to save, got none: {self.sentence()}")
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"path: expected a name ending in .json, got {shortened(str(path))}")
        write_json(path, {**settings_of(self.chosen.strategy), "calibration": self.as_json()})

    def as_json(self) -> dict[str, Any]:
        """Return all figures as plain data."""
        trials = [
            {**settings_of(trial.strategy), "flops": trial.flops, "time": trial.time}
            | {"loss": trial.loss._asdict()}
            for trial in self.trials
        ]
        return {
            "metric": self.metric,
            "tolerance": self.tolerance,
            "images": self.images,
            "dense_accuracy": self.dense_accuracy,
            "result": self.sentence(),
            "refused": self.refused,
            "measured_on": self.measured_on,
            "trials": trials,
        }


def _interval(loss: Interval) -> str:
    return f"{loss.mean:.4f} ({loss.low:.4f} to {loss.high:.4f})"
