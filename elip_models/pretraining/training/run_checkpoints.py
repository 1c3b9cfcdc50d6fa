"""The checkpoints of a run, written completely or not at all, and verified before they are loaded.

step_00001000/             model, optimiser, random generators
step_00001000/run.json     the step, the invariants that a resumed run must share, and the
                           SHA-256 of each file
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from elip_models.saving.files import damage_of, read_object, sha256_of, write_json
from elip_models.saving.saved_folder import publish, unfinished
from elip_models.validation import TrainingError

MANIFEST = "run.json"
NAME = re.compile(r"step_\d{8,}")


class Checkpoints:
    """The checkpoints in the folder `path`. Several processes may read; one process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def of(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`, which need not exist."""
        return self.path / f"step_{step:08d}"

    def latest(self, warn: Callable[[str], object] = lambda line: None) -> Path | None:
        """Return the newest undamaged checkpoint; None if there are no checkpoints.

        `warn` is called with a description of each damaged checkpoint that is newer. If all are
        damaged, TrainingError is raised.
        """
        damages = []
        for checkpoint in reversed(self._all()):
            if (damage := _damage_of(checkpoint)) is None:
                for line in damages:
                    warn(f"{line}; resuming {checkpoint.name} instead")
                return checkpoint
            damages.append(f"{checkpoint} is damaged: {damage}")
        if damages:
            raise TrainingError(
                f"{'; '.join(damages)}; no undamaged checkpoint is left: set another output_dir, "
                f"or remove {self.path.parent} to start anew"
            )
        return None

    def commit(self, step: int, *, keep: int, **invariants: int | list[int]) -> None:
        """Publish the checkpoint in `unfinished(of(step))`, and keep it and the `keep - 1` before.

        Later checkpoints are damaged ones, which the run did not resume. A resumed run must share
        the `invariants`.
        """
        folder = unfinished(self.of(step))
        state = {"step": step, "invariants": invariants, "sha256": sha256_of(folder)}
        write_json(folder / MANIFEST, state)
        publish(self.of(step))
        checkpoints = self._all()
        end = checkpoints.index(self.of(step)) + 1
        for checkpoint in (*checkpoints[: max(0, end - keep)], *checkpoints[end:]):
            hidden = checkpoint.rename(unfinished(checkpoint))  # half-removed, it must not be used
            shutil.rmtree(hidden, ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Remove checkpoints that a killed run left half-written or half-removed."""
        for folder in self.path.glob(".step_*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        folders = (path for path in self.path.glob("step_*") if NAME.fullmatch(path.name))
        return sorted(folders, key=_step_in)


def step_of(checkpoint: Path, **invariants: int | list[int]) -> int:
    """Return the step of a checkpoint; raise TrainingError if it has other `invariants`."""
    state = read_object(checkpoint / MANIFEST)
    for name, value in invariants.items():
        if (saved := state["invariants"].get(name)) != value:
            raise TrainingError(
                f"{checkpoint} cannot be resumed: expected {name} = {saved!r:.100}, got {value}"
            )
    return state["step"]


def _damage_of(checkpoint: Path) -> str | None:
    """Describe how a checkpoint is damaged; None if every file matches its SHA-256."""
    try:
        state = read_object(checkpoint / MANIFEST)
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or not what was written"
    is_whole = (
        state.keys() == {"step", "invariants", "sha256"}
        and state["step"] == _step_in(checkpoint)
        and isinstance(state["invariants"], dict)
        and isinstance(state["sha256"], dict)
        and state["sha256"]
    )
    if not is_whole:
        return f"{MANIFEST} is not what was written"
    return damage_of(checkpoint, state["sha256"])


def _step_in(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
