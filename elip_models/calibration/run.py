"""What a calibration measures on its two parts of the images: outputs, differences, times."""

import copy
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from elip_kernels import __version__
from elip_models.calibration.candidates import Candidate
from elip_models.calibration.choice import (
    Parts,
    difference,
    images_needed,
    is_within,
    may_be_within,
    split,
)
from elip_models.calibration.costs import Cost, measured_costs
from elip_models.calibration.outputs import OUTPUTS, StoredOutputs
from elip_models.calibration.pictures import merged_picture
from elip_models.calibration.results import Setting, Worst
from elip_models.calibration.search import Search
from elip_models.calibration.task import Measure, Part, Task
from elip_models.intervals import Interval, interval_of_totals
from elip_models.profiling.measure import time_side_by_side
from elip_models.recovery.distill import distill
from elip_models.saving.files import tensors_sha256

PORTIONS = (50, 200)
"""Images that are measured before all, if there are many more; the last give a first answer."""
SHOWN = 10  # images that lose most
DENSE_PASSES = 5
"""Forward passes of the dense model for an image that take as long as all of a run does for it."""


class Run:
    """What is measured on the two parts of the images: outputs, differences, times.

    Attributes:
        decides: the measure that decides.
        parts: the images that choose, and those held back.

    Args:
        minutes: use only as many images as about this time allows; 0: all.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        tolerance: float,
        *,
        seed: int,
        minutes: float,
        folder: str | os.PathLike | None,
        progress: Callable[[str], object],
        announce: Callable[[str], object],
        batch_size: int,
    ) -> None:
        self.model, self.task, self.tolerance, self.progress = model, task, tolerance, progress
        self.decides, self.seed = task.measures[0], seed
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.announce = announce
        share = self._affordable(minutes, batch_size) if minutes else 1.0
        least = task.least_of_group
        self.parts: Parts = split(task.count, task.groups(), seed=seed, share=share, least=least)
        self.batch_sizes = sorted({1, min(batch_size, len(self.parts.chosen_on))})
        self.folder = None if folder is None else Path(folder)
        progress("the weights and the images")
        task.fit(model, self.parts.chosen_on)
        origin = {}
        if self.folder is not None:
            origin = {"task": task.name, "contents": task.contents(), "version": __version__}
            origin |= {"model": tensors_sha256(model.state_dict()), "dtype": str(self.dtype)}
            origin |= {"device": self.device.type}
        self.outputs = StoredOutputs(task, self.folder, origin, progress=progress)
        self._of_dense: dict[tuple[tuple[int, ...], ...], dict[str, Measure]] = {}
        self._held_back: dict[str, dict[str, Measure]] = {}
        self._differences: dict[tuple[str, tuple[int, ...]], dict[str, Interval]] = {}

    def _affordable(self, minutes: float, batch_size: int) -> float:
        """Return the share of the images that a run of some minutes can measure."""
        self.progress("the time of the dense model")
        images = range(min(batch_size, self.task.count))
        steps = self.task.steps(self.model, images)
        times = time_side_by_side(steps, device=self.device, rounds=1)
        seconds = sum(time for (time,) in times.values()) / len(images)
        count = max(PORTIONS[0], round(60 * minutes / (DENSE_PASSES * seconds)))
        if count >= self.task.count:
            return 1.0
        self.announce(f"About {count} of {self.task.count} images, for {minutes:g} minutes.")
        return count / self.task.count

    def searched(
        self,
        ladders: dict[str, list[Candidate]],
        *,
        every: bool,
    ) -> Search:
        """Return the search over all images that choose, after a first answer on few of them.

        A setting that may not be within the tolerance by one of the `PORTIONS` is not measured on
        more, unless `every` asks for it.
        """
        chosen_on = self.parts.chosen_on
        drawn = random.Random(self.seed).sample(chosen_on, len(chosen_on))
        portions = [
            tuple(sorted(drawn[:count])) for count in PORTIONS if 2 * count <= len(chosen_on)
        ]

        def is_promising(setting: Candidate) -> bool:
            return all(self._may_be_within(portion, setting) for portion in portions)

        if len(portions) == len(PORTIONS):
            first = Search(partial(self._mean_within, portions[-1]), is_promising=is_promising)
            first.add_all(ladders.values())
            self.announce(self._first_answer(first, portions[-1]))
        within = partial(self._within, chosen_on)
        search = Search(within, is_promising=None if every else is_promising, every=every)
        search.add_all(ladders.values())
        if not search.tried:  # the safest is reported
            safest = (ladder[0] for ladder in ladders.values() if ladder)
            search.tried += sorted(safest, key=lambda setting: setting.flops)[-1:]
        return search

    def _may_be_within(self, images: tuple[int, ...], setting: Candidate) -> bool:
        interval = self.differences(setting, images)[self.decides]
        return may_be_within(interval, len(images), len(self.parts.chosen_on), self.tolerance)

    def _within(self, images: tuple[int, ...], setting: Candidate) -> bool:
        return is_within(self.differences(setting, images)[self.decides], self.tolerance)

    def _mean_within(self, images: tuple[int, ...], setting: Candidate) -> bool:
        """Return whether the difference itself is within: few images have a wide interval."""
        return self.differences(setting, images)[self.decides].mean > -self.tolerance

    def _first_answer(self, search: Search, images: tuple[int, ...]) -> str:
        """Return the cheapest setting on a few images as a sentence."""
        where, follow = f"First answer, on {len(images)} images:", "More images follow."
        best = min(search.within, key=lambda setting: setting.flops, default=None)
        if best is None:
            return f"{where} no setting seems to be within the tolerance. {follow}"
        interval = self.differences(best, images)[self.decides]
        return (
            f"{where} {best.name} at {best.flops:.2f} of the dense FLOPs seems to be within the "
            f"tolerance: {100 * interval.mean:+.1f} points of {self.decides} (95% CI "
            f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}). {follow}"
        )

    def part(self, setting: Candidate | None, images: Sequence[int]) -> Part:
        """Return what the dense model and a setting returned for images."""
        dense = self.outputs.of(None, lambda: self.model, images, name="dense")
        if setting is None:
            return Part(images, dense, dense)
        outputs = self.outputs.of(
            setting.settings, lambda: self.reduced(setting), images, name=setting.name
        )
        return Part(images, outputs, dense)

    def reduced(self, setting: Candidate) -> nn.Module:
        """Return a copy of the model with a setting, which shares its weights."""
        return self.task.reduced(self.model, setting.strategy)

    def differences(self, setting: Candidate, images: tuple[int, ...]) -> dict[str, Interval]:
        """Return the difference from dense of each measure on some of the images that choose."""
        key = setting.name, images
        if key not in self._differences:
            reduced = self.task.measured(self.part(setting, images))
            self._differences[key] = _differences(reduced, self._dense(images))
        return self._differences[key]

    def lower_end(self, setting: Candidate) -> float:
        """Return the lower end of the interval that decides."""
        return self.differences(setting, self.parts.chosen_on)[self.decides].low

    def held_back(self, setting: Candidate | None) -> dict[str, Measure]:
        """Return the measures on the images held back; what is fitted, is fitted on the others."""
        if setting is None:
            return self._dense(*self.parts)
        if setting.name not in self._held_back:
            chosen_on, held_back = (self.part(setting, images) for images in self.parts)
            self._held_back[setting.name] = self.task.measured(chosen_on, held_back)
        return self._held_back[setting.name]

    def is_confirmed(self, setting: Candidate) -> bool:
        """Return whether a setting is within the tolerance on the images held back."""
        measured, dense = (self.held_back(which)[self.decides] for which in (setting, None))
        return is_within(difference(measured, dense), self.tolerance)

    def _dense(self, *parts: tuple[int, ...]) -> dict[str, Measure]:
        """Return the measures of the dense model, which are computed once."""
        if parts not in self._of_dense:
            measured = self.task.measured(*(self.part(None, images) for images in parts))
            self._of_dense[parts] = measured
        return self._of_dense[parts]

    def dense_scores(self) -> dict[str, Interval]:
        """Return the measures of the dense model on the images held back."""
        return {
            name: interval_of_totals(measure.rows, measure.statistic)
            for name, measure in self.held_back(None).items()
        }

    def setting(
        self, setting: Candidate, role: str, cost: Cost | None, *, held_back: bool
    ) -> Setting:
        """Return everything that is reported of a setting."""
        apart = None
        if held_back:
            apart = _differences(self.held_back(setting), self.held_back(None))
        return Setting(
            name=setting.name,
            strategy=setting.settings,
            flops=setting.flops,
            kept=setting.kept,
            time={} if cost is None else cost.time,
            memory=None if cost is None else cost.memory,
            differences=self.differences(setting, self.parts.chosen_on),
            role=role,
            held_back=apart,
        )

    def costs(self, settings: Sequence[Candidate], *, compile: bool) -> dict[str, Cost]:
        """Return the time and memory of settings, by name."""
        if not settings:
            return {}
        self.progress(f"times of {len(settings)} settings")
        models = {setting.name: self.reduced(setting) for setting in settings}
        return self._costs(models, compile=compile)

    def _costs(self, models: dict[str, nn.Module], *, compile: bool) -> dict[str, Cost]:
        return measured_costs(
            self.task,
            self.model,
            models,
            self.parts.chosen_on,
            batch_sizes=self.batch_sizes,
            compile=compile,
        )

    def distilled(
        self,
        model: nn.Module,
        setting: Candidate,
        steps: int,
        *,
        compile: bool,
        time: bool,
        save: Callable[[nn.Module], object],
    ) -> Setting:
        """Train a setting on the images that choose, and return what is reported of it."""
        images = ImagesOf(self.task.images, self.parts.chosen_on)
        name = f"{setting.name}, distilled"
        student, checkpoint = copy.deepcopy(model), None
        if self.folder is not None:
            digest = tensors_sha256({name: torch.empty(0)})[:8]
            checkpoint = self.folder / OUTPUTS / f"distill-{digest}.safetensors"
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with torch.enable_grad():
            distill(
                student,
                images,
                strategy=setting.strategy,
                steps=steps,
                seed=self.seed,
                checkpoint=checkpoint,
                progress=lambda step, loss: self.progress(f"{name}: step {step} of {steps}"),
            )
        save(student)
        if checkpoint is not None:
            checkpoint.unlink()
        student = student.to(self.dtype)
        key = {"distilled": tensors_sha256(student.state_dict()), **setting.settings}
        parts = [
            Part(
                images,
                self.outputs.of(key, lambda: student, images, name=name),
                self.part(None, images).dense,
            )
            for images in self.parts
        ]
        cost = Cost({}, None)
        if time:
            sizes = {"batch_sizes": self.batch_sizes, "compile": compile}
            models = {name: student}
            cost = measured_costs(self.task, self.model, models, self.parts.chosen_on, **sizes)[
                name
            ]
        dense = self._dense(self.parts.chosen_on)
        return Setting(
            name=name,
            strategy=setting.settings,
            flops=setting.flops,
            kept=setting.kept,
            time=cost.time,
            memory=cost.memory,
            differences=_differences(self.task.measured(parts[0]), dense),
            role="distilled",
            held_back=_differences(self.task.measured(*parts), self.held_back(None)),
        )

    def needed(self, choice: Setting | None, tried: Sequence[Candidate]) -> int | None:
        """Return how many images both parts need to show that a setting is within the tolerance.

        The loss of a choice is that on the images held back; its interval is the wider of both.
        """
        if choice is None:
            part = self.parts.chosen_on
            intervals = [self.differences(setting, part)[self.decides] for setting in tried]
        else:
            part, held_back = self.parts.held_back, choice.held_back[self.decides]
            of_both = choice.differences[self.decides], held_back
            width = max(interval.mean - interval.low for interval in of_both)
            intervals = [held_back._replace(low=held_back.mean - width)]
        counts = [images_needed(interval, len(part), self.tolerance) for interval in intervals]
        return min((2 * count for count in counts if count is not None), default=None)

    def worst(self, setting: Candidate, names: Sequence[str] | None) -> tuple[Worst, ...]:
        """Return the images held back that lose most by a setting."""
        images = self.parts.held_back
        reduced, dense = (self.held_back(which)[self.decides] for which in (setting, None))
        with np.errstate(invalid="ignore", divide="ignore"):
            gaps = reduced.statistic(reduced.rows) - dense.statistic(dense.rows)
        gaps = np.nan_to_num(gaps)
        order = [int(row) for row in np.argsort(gaps, kind="stable")[:SHOWN] if gaps[row] < 0]
        part, shown = self.part(setting, images), [images[row] for row in order]
        answers = [self._answers(shown, part_of, order) for part_of in (part.dense, part.outputs)]
        truths = self.task.truths(shown) or [""] * len(shown)
        model = self.reduced(setting)
        return tuple(
            Worst(
                names[image] if names else f"image {image}",
                was,
                now,
                truth,
                merged_picture(self.task, model, image),
            )
            for image, was, now, truth in zip(shown, *answers, truths, strict=True)
        )

    def _answers(
        self, images: Sequence[int], outputs: dict[str, Tensor], rows: Sequence[int]
    ) -> list[str]:
        of_images = {name: value[list(rows)] for name, value in outputs.items()}
        return self.task.answers(images, of_images) or [""] * len(images)


class ImagesOf(Sequence):
    """Some of the images of a sequence."""

    def __init__(self, images: Tensor | Sequence[Tensor], numbers: Sequence[int]) -> None:
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[self.numbers[i]]


def _differences(reduced: dict[str, Measure], dense: dict[str, Measure]) -> dict[str, Interval]:
    return {name: difference(reduced[name], dense[name]) for name in reduced}
