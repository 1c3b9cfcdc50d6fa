"""The result of a calibration: what was measured, the choice, and the files that report both.

results.save("calibrated")      report.html, report.md, results.json and, if usable, best.json
Results.read("calibrated/results.json") == results
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from elip_models.calibration import report
from elip_models.intervals import Interval
from elip_models.profiling.measure import no_gain
from elip_models.saving.files import read_object, write_file, write_json

JSON, BEST = "results.json", "best.json"
VERSION = 1
"""Of `results.json`."""
NAMED = ("chosen", "nearest")
"""Fields of `Results` that are one of its settings, which JSON has by name."""


class Setting(NamedTuple):
    """A setting that was measured.

    Attributes:
        name: the strategy and the share of tokens that it keeps, such as "merge 0.7".
        strategy: the strategy as plain JSON, as `reduce_` reads it from a file.
        flops: its share of the dense FLOPs, scoring included.
        kept: the mean share of tokens over the layers.
        time: its share of the dense time by batch size and step: {"1": 0.8, "8": 0.7}; {} if it
            was not timed.
        memory: its share of the dense peak of GPU memory, or None.
        differences: by measure, reduced minus dense on the images that choose.
        role: "tried", "compared", "control", "chosen" or "distilled".
        held_back: as `differences`, on the images held back; None if it was not measured there.
            A "tried" setting was tested there before the choice, or failed after it.
    """

    name: str
    strategy: dict[str, Any]
    flops: float
    kept: float
    time: Mapping[str, Interval | float]
    memory: float | None
    differences: dict[str, Interval]
    role: str
    held_back: dict[str, Interval] | None = None


class Worst(NamedTuple):
    """An image that loses much.

    Attributes:
        image: the file name.
        dense: what the dense model answered, in words; "" if it gives no answer.
        reduced: what the reduced model answered, likewise.
        truth: the right answer; "" if there is none.
        picture: a PNG of what was merged; b"" if there is none.
    """

    image: str
    dense: str
    reduced: str
    truth: str
    picture: bytes


@dataclass(frozen=True)
class Results:
    """Everything that a calibration reports.

    Attributes:
        task: the name of the task.
        measures: their names; the first decides.
        tolerance: the largest loss by that measure.
        model: the name of the model.
        counts: the numbers of images, "chosen_on" and "held_back".
        dense: the measures of the dense model on the images held back.
        settings: all that were measured, in any order.
        chosen: that of the role "chosen"; None if no setting is within the tolerance.
        nearest: the choice, or else the setting tried whose worst loss is least; None if no
            strategy can reduce the model.
        confirmed: whether the choice is within the tolerance on the images held back, too.
        needed: if it is not, about how many images of both parts would show it; None if unknown.
        refused: strategies that cannot reduce this model, with the reason.
        machine: device, precision and versions, by name.
        worst: images held back that lose most by the choice or the nearest setting.
    """

    task: str
    measures: tuple[str, ...]
    tolerance: float
    model: str
    counts: dict[str, int]
    dense: dict[str, Interval]
    settings: tuple[Setting, ...]
    chosen: Setting | None
    nearest: Setting | None
    confirmed: bool
    needed: int | None
    refused: dict[str, str]
    machine: dict[str, Any]
    worst: tuple[Worst, ...] = ()

    @property
    def decides(self) -> str:
        """Return the measure that decides."""
        return self.measures[0]

    @property
    def cost_key(self) -> str | None:
        """Return the time that decides, a key of `Setting.time`; None if no choice was timed.

        It is the first step of the largest batch.
        """
        keys = () if self.chosen is None else self.chosen.time
        return max(keys, key=lambda key: int(key.split()[0]), default=None)

    def cost(self, setting: Setting) -> float | None:
        """Return the time of a setting that decides, or its FLOPs if no choice was timed."""
        if self.cost_key is None:
            return setting.flops
        time = setting.time.get(self.cost_key)
        return time.mean if isinstance(time, Interval) else time

    @property
    def saves_time(self) -> bool:
        """Return whether the choice is faster than dense; True for one that was not timed."""
        if self.chosen is None or self.cost_key is None:
            return self.chosen is not None
        return not no_gain(self.cost(self.chosen))

    @property
    def usable(self) -> bool:
        """Return whether there is a choice that is confirmed and saves time."""
        return self.confirmed and self.saves_time

    def sentence(self) -> str:
        """Return the result in one sentence, and what it lacks in a second and third."""
        tolerance, count = report.points(self.tolerance), sum(self.counts.values())
        if self.chosen is None:
            if self.nearest is None:
                return "No strategy can reduce this model."
            return (
                f"No setting was shown to lose less than {tolerance}. The nearest is "
                f"`{self.nearest.name}`, which {self._change(self.nearest.differences)} on the "
                f"{self.counts['chosen_on']} images that choose.{self._need(count)}"
            )
        result = (
            f"`{self.chosen.name}` takes {self._cost(self.chosen)} and "
            f"{self._change(self.chosen.held_back)} on {self.counts['held_back']} images held back."
        )
        if not self.saves_time:
            return f"No setting within {tolerance} saves time on this machine. {result}"
        if self.confirmed:
            return result
        return f"{result} This does not confirm a loss of less than {tolerance}.{self._need(count)}"

    def _cost(self, setting: Setting) -> str:
        if self.cost_key is None:
            return f"{setting.flops:.2f} of the FLOPs"
        batch_size, _, step = self.cost_key.partition(" ")
        of = f"{step} time" if step else "time"
        return f"{self.cost(setting):.2f} of the {of} at batch {batch_size}"

    def _change(self, differences: dict[str, Interval]) -> str:
        """Return "changes top-1 by -0.4 points (-1.1 to 0.3)"."""
        mean, ends = report.change(differences[self.decides]).split(" ", 1)
        return f"changes {self.decides} by {mean} points {ends}"

    def _need(self, count: int) -> str:
        if self.needed is None:
            return " More images would not show it: the measured loss itself is not within."
        return f" About {self.needed:,} images in all would show it, instead of {count:,}."

    def table(self) -> str:
        """Return the settings as lines of text; changes are in points, with 95% intervals."""
        shown = (self.decides,)
        cells = [report.columns(self, shown), *(row.cells for row in report.rows(self, shown))]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        )
        left_out = (f"{name}: {reason}" for name, reason in self.refused.items())
        return "\n".join((*lines, *left_out))

    def __str__(self) -> str:
        return f"{self.table()}\n{self.sentence()}"

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data; `of_json` reads it."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        worst = [
            {**image._asdict(), "picture": base64.b64encode(image.picture).decode()}
            for image in self.worst
        ]
        return {
            "version": VERSION,
            "result": self.sentence(),
            **plain,
            "measures": list(self.measures),
            "dense": _plain(self.dense),
            "settings": [_plain(setting._asdict()) for setting in self.settings],
            **{name: getattr(getattr(self, name), "name", None) for name in NAMED},
            "worst": worst,
        }

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> "Results":
        """Return the results that `as_json` returned.

        Raises:
            ValueError: a later version wrote them.
        """
        if stored.get("version") != VERSION:
            raise ValueError(
                f"`version` must be {VERSION}, got {stored.get('version')!r}. Read the results "
                "with the elip-kernels that wrote them."
            )
        values = {field.name: stored[field.name] for field in fields(cls)}
        settings = tuple(Setting(**_restored(setting)) for setting in stored["settings"])
        by_name = {setting.name: setting for setting in settings}
        worst = [
            Worst(**{**image, "picture": base64.b64decode(image["picture"])})
            for image in stored["worst"]
        ]
        return cls(
            **values
            | {
                "measures": tuple(stored["measures"]),
                "dense": _restored(stored["dense"]),
                "settings": settings,
                **{name: by_name.get(values[name]) for name in NAMED},
                "worst": tuple(worst),
            }
        )

    @classmethod
    def read(cls, path: str | Path) -> "Results":
        """Return the results in a file `results.json`; ValueError if it is none."""
        try:
            return cls.of_json(read_object(Path(path)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected results of a calibration, got {error!r}") from error

    def save(self, folder: str | Path) -> None:
        """Write the report as HTML, Markdown and JSON, and a usable choice for `reduce_`.

        The choice of an earlier run is removed first, so that `best.json` is never another one than
        that of the report.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BEST).unlink(missing_ok=True)
        write_json(folder / JSON, self.as_json())
        write_file(folder / "report.md", report.markdown(self).encode())
        write_file(folder / "report.html", report.html(self).encode())
        if self.usable:
            facts = {"result": self.sentence(), "model": self.model, "task": self.task}
            choice = {**self.chosen.strategy, "calibration": facts | {"tolerance": self.tolerance}}
            write_json(folder / BEST, choice)


def _plain(value: Any) -> Any:
    """Return nested dicts with intervals as dicts."""
    if isinstance(value, Interval):
        return value._asdict()
    return {key: _plain(of) for key, of in value.items()} if isinstance(value, Mapping) else value


def _restored(value: Any) -> Any:
    """Return nested dicts in which each dict of the ends of an interval is an interval."""
    if not isinstance(value, dict):
        return value
    if value.keys() == set(Interval._fields):
        return Interval(**value)
    return {key: _restored(of) for key, of in value.items()}
