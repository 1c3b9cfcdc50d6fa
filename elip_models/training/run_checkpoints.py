"""The checkpoints of a run: whole, or not there, and a damaged one is noticed before it is loaded.

    step_00001000/             model, optimiser, random generators
    step_00001000/run.json     the step, what a run that resumes it must have in common with it, and
                               of every file its size and SHA-256; written last

A checkpoint is written under a hidden name and renamed when complete, and an old one is renamed
before it is removed. So whatever is seen, and is not as its `run.json` says, was damaged later.
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
    """Those in the folder `path`, which need not be there. Several processes read, one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def latest(self, tell: Callable[[str], object] = lambda line: None) -> Path | None:
        """The newest one that is whole; None where there is none at all.

        Args:
            tell: is told of each damaged one that is newer, and what is wrong with it.

        Raises:
            TrainingError: all that there are are damaged.
        """
        found = self._visible()
        damages = []
        for checkpoint in reversed(found):
            if (damage := damage_of(checkpoint)) is None:
                for each in damages:
                    tell(f"{each}; resuming {checkpoint.name} instead")
                return checkpoint
            damages.append(f"{checkpoint} is damaged: {damage}")
        if damages:
            raise TrainingError(
                f"{'; '.join(damages)}; no whole checkpoint is left: set another output_dir, or "
                f"remove {self.path.parent} to start anew"
            )
        return None

    def unfinished(self, step: int) -> Path:
        """Where to write the checkpoint of `step`, before `commit`."""
        return self.path / f".step_{step:08d}"

    def commit(self, step: int, *, keep: int, **invariants: int | list[int]) -> None:
        """Puts the checkpoint of `step` in place, and keeps the `keep` newest.

        `invariants` are numbers, or lists of them, that a run which resumes it must have in common.
        """
        unfinished = self.unfinished(step)
        state = {"step": step, "invariants": invariants, "files": _files(unfinished)}
        text = json.dumps(state | {"sha256": _digest(state)}, indent=2)
        (unfinished / STATE_FILE).write_text(text, encoding="utf-8")
        final = self.path / f"step_{step:08d}"
        self._remove([final] * final.exists())
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
        """Oldest first."""
        named = (each for each in self.path.glob("step_*") if NAME.fullmatch(each.name))
        return sorted(named, key=lambda each: int(each.name.removeprefix("step_")))


def step_of(checkpoint: Path, **invariants: int | list[int]) -> int:
    """The step of a whole checkpoint; TrainingError where it has other `invariants`."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    for name, value in invariants.items():
        if state["invariants"].get(name) != value:
            raise TrainingError(
                f"{checkpoint} cannot be resumed: expected {name} = "
                f"{state['invariants'].get(name)}, got {value}"
            )
    return state["step"]


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where each byte is as it was written."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if state.pop("sha256") != _digest(state):
            raise ValueError("it was changed")
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
    """Size and SHA-256 of all files of a checkpoint, those of folders in it too."""
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
