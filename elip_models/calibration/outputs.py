"""The outputs of models for images, each computed once, in a folder or in memory.

A file of the folder has the outputs of one setting. Its name is a SHA-256 of everything that they
depend on: model, setting, precision, images and task. So a stopped run goes on, and a run with more
images or another tolerance computes only what is new.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elip_models.calibration.task import Outputs, Task
from elip_models.saving.files import read_state, write_json, write_tensors

PORTION = 64
"""Images between two looks at the clock, at least."""
SAVE_SECONDS = 20
MARKER, OUTPUTS = "run.json", "outputs"
"""In the folder: what the first outputs were of, and the folder of all outputs."""
IMAGES = "images"
"""The tensor with the numbers of the images."""


class StoredOutputs:
    """Outputs of a task, by model and setting.

    Args:
        task: what computes them.
        folder: where they are stored; None: in memory.
        origin: what all outputs depend on, as plain JSON.
        progress: is called with a line of text while images are run.
    """

    def __init__(
        self,
        task: Task,
        folder: Path | None,
        origin: dict[str, Any],
        *,
        progress: Callable[[str], object],
    ) -> None:
        self.task, self.folder, self.origin, self.progress = task, folder, origin, progress
        self.portion = max(PORTION, getattr(task, "batch_size", 1))
        self._kept: dict[str, Outputs] = {}

    def of(
        self,
        setting: dict[str, Any] | None,
        model: Callable[[], nn.Module],
        images: Sequence[int],
        *,
        name: str,
    ) -> Outputs:
        """Return the outputs of a model for images, row i for `images[i]`.

        Args:
            setting: what the model is beside `origin`, as plain JSON.
            model: returns the model; it is called if some outputs are missing.
            images: numbers of images, ascending.
            name: of the setting, for progress.
        """
        key = {**self.origin, "setting": setting}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        stored = self._read(digest)
        known = set(stored[IMAGES].tolist()) if stored else set()
        missing = [i for i in images if i not in known]
        if missing:
            stored = self._computed(model(), missing, stored, (digest, key), name)
        if self.folder is None or setting is None:
            self._kept[digest] = stored
        row_of = {number: row for row, number in enumerate(stored[IMAGES].tolist())}
        rows = torch.tensor([row_of[i] for i in images])
        return {label: value[rows] for label, value in stored.items() if label != IMAGES}

    def _computed(
        self,
        model: nn.Module,
        missing: Sequence[int],
        stored: Outputs,
        file: tuple[str, dict[str, Any]],
        name: str,
    ) -> Outputs:
        """Return the stored outputs and those of the missing images, which are stored."""
        start = saved = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            left = (time.monotonic() - start) / done * (len(missing) - done)
            self.progress(f"{name}: {done} of {len(missing)} images, {_duration(left)} left")

        for first in range(0, len(missing), self.portion):
            numbers = missing[first : first + self.portion]
            outputs = self.task.outputs(model, numbers, advance)
            outputs = {**outputs, IMAGES: torch.tensor(numbers)}
            stored = {
                label: torch.cat([stored[label], value]) if stored else value
                for label, value in outputs.items()
            }
            is_last = first + self.portion >= len(missing)
            if self.folder is not None and (is_last or time.monotonic() > saved + SAVE_SECONDS):
                self._write(file, stored)
                saved = time.monotonic()
        return stored

    def _write(self, file: tuple[str, dict[str, Any]], stored: Outputs) -> None:
        (self.folder / OUTPUTS).mkdir(parents=True, exist_ok=True)
        if not (self.folder / MARKER).exists():
            write_json(self.folder / MARKER, self.origin)
        write_tensors(self._path(file[0]), stored, {"of": file[1]})

    def _read(self, digest: str) -> dict[str, Tensor]:
        """Return what is stored, or nothing; ValueError for a file that is damaged."""
        if digest in self._kept:
            return self._kept[digest]
        if self.folder is None or not self._path(digest).is_file():
            return {}
        try:
            return read_state(self._path(digest))[1]
        except (TypeError, ValueError) as error:
            raise ValueError(f"folder: {error!s:.300}; remove the file to run again") from error

    def _path(self, digest: str) -> Path:
        return self.folder / OUTPUTS / f"{digest[:32]}.safetensors"


def _duration(seconds: float) -> str:
    """Return "40 s", "3 min" or "2 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"
