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

from elip_models.saving.files import read_object, sync, write_file
from elip_models.validation import TrainingError

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
        write_file(unfinished / STATE_FILE, text.encode())
        final = self.path / f"step_{step:08d}"
        if final.exists():
            self._remove([final])
        os.replace(unfinished, final)
        sync(self.path)
        self._remove(self._visible()[:-keep])
        self.remove_unfinished()

    def remove_unfinished(self) -> None:
        """Remove checkpoints that a killed run left half-written or half-removed."""
        for pattern in (".step_*", ".removed_*"):
            for each in self.path.glob(pattern):
                shutil.rmtree(each, ignore_errors=True)

    def _remove(self, checkpoints: list[Path]) -> None:
        for each in checkpoints:
            hidden = each.with_name(f".removed_{each.name}")
            shutil.rmtree(hidden, ignore_errors=True)
            os.replace(each, hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def _visible(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        named = (
            each for each in self.path.glob("step_*") if NAME.fullmatch(each.name) and each.is_dir()
        )
        return sorted(named, key=lambda each: int(each.name.removeprefix("step_")))


def step_of(checkpoint: Path, **invariants: int | list[int]) -> int:
    """Return the step of a checkpoint; raise TrainingError if it has other `invariants`."""
    state = _read_state(checkpoint)
    for name, value in invariants.items():
        if state["invariants"].get(name) != value:
            raise TrainingError(
                f"{checkpoint} cannot be resumed: expected {name} = "
                f"{state['invariants'].get(name)!r:.100}, got {value}"
            )
    return state["step"]


def damage_of(checkpoint: Path) -> str | None:
    """Describe how a checkpoint is damaged; None if every file matches its SHA-256."""
    try:
        files, names = _read_state(checkpoint)["files"], _names(checkpoint)
        if missing := files.keys() - names:
            return f"{min(missing):.100} is missing"
        if others := names - {STATE_FILE} - files.keys():
            return f"{min(others):.100} is not listed in {STATE_FILE}"
        for name, expected in files.items():
            if (size := (checkpoint / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size} of {expected['bytes']} bytes"
            if _sha256(checkpoint / name) != expected["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of `run.json`; raise ValueError if it is not what `commit` writes."""
    state = read_object(checkpoint / STATE_FILE)
    digest, problem = state.pop("sha256", None), None
    if state.keys() != {"step", "invariants", "files"}:
        problem = "wrong keys"
    elif type(state["step"]) is not int or checkpoint.name != f"step_{state['step']:08d}":
        problem = f"step {state['step']!r:.100}"
    elif not isinstance(state["files"], dict) or not all(map(_is_entry, state["files"].values())):
        problem = "no size and SHA-256 of each file"
    elif not _are_invariants(state["invariants"]):
        problem = "no invariants"
    elif digest != _digest(state):
        problem = "wrong SHA-256"
    if problem is not None:
        raise ValueError(f"{STATE_FILE} is not what was written ({problem})")
    return state


def _is_entry(entry: Any) -> bool:
    kinds = {"bytes": int, "sha256": str}
    return isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == kinds


def _are_invariants(values: Any) -> bool:
    if not isinstance(values, dict):
        return False
    lists = (value if isinstance(value, list) else [value] for value in values.values())
    return all(type(each) is int for several in lists for each in several)


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file, when they and their names are on the disk."""
    for each in (*folder.rglob("*"), folder):
        sync(each)
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in sorted(_names(folder))
    }


def _names(folder: Path) -> set[str]:
    """Return the relative paths of the files in a folder, without those of the system, `.NAME`.

    torch.distributed.checkpoint writes `.metadata`.
    """
    return {
        each.relative_to(folder).as_posix()
        for each in folder.rglob("*")
        if each.is_file() and (each.name == ".metadata" or not each.name.startswith("."))
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
