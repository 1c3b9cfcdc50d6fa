"""The checkpoints of a run, written atomically and verified before they are loaded.

    step_00001000/             model, optimiser, random generators
    step_00001000/run.json     the step, the invariants that a resumed run must share, and the size
                               and SHA-256 of every file; written last

A checkpoint is written under a hidden name and renamed when complete. An old one is renamed before
it is removed. So a visible checkpoint that does not match its `run.json` was damaged afterwards.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elip_models.training.errors import TrainingError

NAME = re.compile(r"step_\d{8,}")
STATE_FILE = "run.json"


class Checkpoints:
    """The checkpoints in the folder `path`, which may not exist yet.

    Several processes may read; one process writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def latest(self, warn: Callable[[str], object] = lambda line: None) -> Path | None:
        """Return the newest undamaged checkpoint; None if there are no checkpoints.

        `warn` is called with a description of each damaged checkpoint that is newer. If all are
        damaged, TrainingError is raised.
        """
        found = self._visible()
        damages = []
        for checkpoint in reversed(found):
            if (damage := damage_of(checkpoint)) is None:
                for each in damages:
                    warn(f"{each}; resuming {checkpoint.name} instead")
                return checkpoint
            damages.append(f"{checkpoint} is damaged: {damage}")
        if damages:
            raise TrainingError(
                f"{'; '.join(damages)}; no undamaged checkpoint is left: set another output_dir, "
                f"or remove {self.path.parent} to start anew"
            )
        return None

    def unfinished(self, step: int) -> Path:
        """Return the folder in which the checkpoint of `step` is written before `commit`."""
        return self.path / f".step_{step:08d}"

    def commit(self, step: int, *, keep: int, **invariants: int | list[int]) -> None:
        """Rename the finished checkpoint of `step` and remove all but the `keep` newest.

        A resumed run must share the `invariants`.
        """
        unfinished = self.unfinished(step)
        state = {"step": step, "invariants": invariants, "files": _files(unfinished)}
        text = json.dumps(state | {"sha256": _digest(state)}, indent=2)
        (unfinished / STATE_FILE).write_text(text, encoding="utf-8")
        final = self.path / f"step_{step:08d}"
        if final.exists():
            self._remove([final])
        os.replace(unfinished, final)
        self._remove(self._visible()[:-keep])
        for left in self.path.glob(".removed_*"):
            shutil.rmtree(left, ignore_errors=True)

    def _remove(self, checkpoints: list[Path]) -> None:
        for each in checkpoints:
            hidden = each.with_name(f".removed_{each.name}")
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(each, hidden)
            shutil.rmtree(hidden)

    def _visible(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        named = (each for each in self.path.glob("step_*") if NAME.fullmatch(each.name))
        return sorted(named, key=lambda each: int(each.name.removeprefix("step_")))


def step_of(checkpoint: Path, **invariants: int | list[int]) -> int:
    """Return the step of a checkpoint; raise TrainingError if it has other `invariants`."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    for name, value in invariants.items():
        if state["invariants"].get(name) != value:
            raise TrainingError(
                f"{checkpoint} cannot be resumed: expected {name} = "
                f"{state['invariants'].get(name)}, got {value}"
            )
    return state["step"]


def damage_of(checkpoint: Path) -> str | None:
    """Describe how a checkpoint is damaged; None if every file matches its SHA-256."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if state.pop("sha256") != _digest(state):
            raise ValueError("wrong SHA-256")
        files = state["files"]
        for name, expected in files.items():
            if (size := (checkpoint / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size} of {expected['bytes']} bytes"
            if _sha256(checkpoint / name) != expected["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE_FILE} is not what was written ({error})"
    return None


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return {
        each.relative_to(folder).as_posix(): {
            "bytes": each.stat().st_size,
            "sha256": _sha256(each),
        }
        for each in files
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
