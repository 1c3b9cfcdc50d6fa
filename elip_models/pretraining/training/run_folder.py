"""The folder of a run, which stays consistent if the process is killed at any moment.

    recipe.yaml                  the resolved recipe
    provenance.jsonl             versions, commit, command and data, one line for each start
    tokenizer/                   the tokenizer, if it was trained on the captions
    metrics.jsonl                a row every `log_every` steps, and one for each evaluation
    tensorboard/                 the same for TensorBoard
    checkpoints/step_00001000/   the newest checkpoints: model, optimiser, random generators
    model/                       the trained model and its tokenizer
    best/                        those of the step that was selected on the validation split

A checkpoint and a tokenizer are written under a hidden name and renamed when complete. A folder
with other files and no run is not used: nothing is removed that a run did not write.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elip_models.pretraining.data.streams import redacted
from elip_models.pretraining.training.folder_lock import FolderLock
from elip_models.pretraining.training.recipe import load_recipe, resume_conflicts, save_recipe
from elip_models.pretraining.training.run_checkpoints import Checkpoints
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.saving.files import sync, write_file
from elip_models.validation import ConfigError, TrainingError

OTHER_RANK = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher such as torchrun sets for each of its processes."""


class RunFolder:
    """Paths, log and checkpoints of one run. Several processes may read; one process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.tokenizer = self.path / "tokenizer"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.metrics = self.path / "metrics.jsonl"
        self.provenance = self.path / "provenance.jsonl"
        self.model = self.path / "model"
        self.best = self.path / "best"
        self._replaced_best = self.path / ".best_replaced"
        self._new_tokenizer = self.path / ".tokenizer"  # until the run has started
        self._lock = FolderLock(self.path / ".lock")
        self._is_locked = False

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Raise TrainingError if a run of `config` cannot start or resume in this folder."""
        with _as_training_error(self.path):
            is_run = self._is_run()
            others = [] if is_run else self._other_files()
        if not is_run:
            if others:
                raise TrainingError(
                    f"output_dir: expected a new or empty folder, or one of a run, got {self.path} "
                    f"with {', '.join(others[:3])}{' ..' * (len(others) > 3)}: set another "
                    "output_dir"
                )
            return
        if not resume:
            raise TrainingError(
                f"{self.path} already contains a run: continue it with --resume, "
                "or set another output_dir"
            )
        try:
            saved = load_recipe(self.recipe)
        except ConfigError as error:
            raise TrainingError(f"{self.recipe} is not what a run wrote: {error}") from error
        if conflicts := resume_conflicts(saved, config):
            raise TrainingError(
                f"{self.path} cannot be resumed with another recipe: "
                f"{'; '.join(map(redacted, conflicts))}"
            )

    def _is_run(self) -> bool:
        return self.recipe.is_file() and self.provenance.is_file()

    def _other_files(self) -> list[str]:
        """Return the names of files that a run, killed before its start, did not leave."""
        if not self.path.exists():
            return []
        names = sorted(os.listdir(self.path))
        if names == [".lock"] and not self._lock.path.stat().st_size:
            return []
        own = {".lock", self._new_tokenizer.name, self.provenance.name}
        own = own if self._lock.is_signed() else set()
        return [each for each in names if each not in own]

    @contextmanager
    def locked(self, config: RunConfig, *, resume: bool) -> Iterator[None]:
        """Check and lock the folder for this run, and create it if necessary.

        The first of several processes locks it for all. If another run uses the folder, or it
        cannot be created, TrainingError is raised.
        """
        self.check(config, resume=resume)
        if _is_other_rank():
            yield
            return
        created = [each for each in (self.path, *self.path.parents) if not each.exists()]
        self.create()
        try:
            with _as_training_error(self.path):
                self._lock.acquire()
        except BlockingIOError:
            raise TrainingError(
                f"{self.path} is in use by {self._lock.owner()}: wait until it ends, or set "
                "another output_dir"
            ) from None
        self._is_locked = True
        try:
            self.check(config, resume=resume)  # again, another run may have ended just before
            yield
        finally:
            if self._lock.is_held() and not self._is_run():
                self._remove_created(created)
            self._lock.release()
            self._is_locked = False

    def check_lock(self) -> None:
        """Raise TrainingError if the folder was locked, and its lock has been removed since."""
        if self._is_locked and not self._lock.is_held():
            raise TrainingError(
                f"{self._lock.path} was removed or replaced during the run, so another run may "
                "write there: end the other run, then continue this one with --resume"
            )

    def create(self) -> None:
        """Create the folder; raise TrainingError if that fails."""
        with _as_training_error(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def _remove_created(self, created: list[Path]) -> None:
        """Remove what a run created that failed before its start."""
        shutil.rmtree(self._new_tokenizer, ignore_errors=True)
        self.provenance.unlink(missing_ok=True)
        self._lock.path.unlink(missing_ok=True)
        with suppress(OSError):  # other files are there
            for folder in created:
                folder.rmdir()

    def prepare(self) -> None:
        """Create the folder and remove what a killed run left half-written in it."""
        self.create()
        shutil.rmtree(self._new_tokenizer, ignore_errors=True)
        self.checkpoints.remove_unfinished()
        if self._replaced_best.exists() and not self.best.exists():
            os.replace(self._replaced_best, self.best)  # killed in between
        shutil.rmtree(self._replaced_best, ignore_errors=True)

    def record_start(self, config: RunConfig, provenance: dict[str, Any]) -> None:
        """Append a line of provenance and write the recipe: the folder now contains a run.

        A recipe with a command or a password is readable by its owner only.
        """
        self.check_lock()
        _append_line(self.provenance, provenance)
        save_recipe(config, self.recipe, mode=0o600 if _has_secrets(config) else None)
        if self._new_tokenizer.exists():
            os.replace(self._new_tokenizer, self.tokenizer)
            sync(self.path)

    def trained_tokenizer(self) -> Path | None:
        """Return the folder of the tokenizer that the run has trained; None if it has not."""
        found = (each for each in (self.tokenizer, self._new_tokenizer) if each.exists())
        return next(found, None)

    def train_tokenizer(self, save: Callable[[Path], Any]) -> Path:
        """Call `save(folder)` with a hidden folder, which `record_start` renames; return it."""
        save(self._new_tokenizer)
        for each in (*self._new_tokenizer.rglob("*"), self._new_tokenizer):
            sync(each)
        return self._new_tokenizer

    def save_tokenizer(self, save: Callable[[Path], Any]) -> None:
        """Call `save(folder)` with a hidden folder, and rename it when complete."""
        shutil.rmtree(self._new_tokenizer, ignore_errors=True)
        self.train_tokenizer(save)
        os.replace(self._new_tokenizer, self.tokenizer)

    def replace_best(self, save: Callable[[Path], Any]) -> None:
        """Call `save(folder)` with a hidden folder, and rename it to `best` when complete."""
        self.check_lock()
        new = self.path / ".best"
        shutil.rmtree(new, ignore_errors=True)
        save(new)
        for each in (*new.rglob("*"), new):
            sync(each)
        if self.best.exists():
            os.replace(self.best, self._replaced_best)
        os.replace(new, self.best)
        sync(self.path)
        shutil.rmtree(self._replaced_best, ignore_errors=True)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the log, without the lines that are none."""
        return [row for row in map(_row, self._lines()) if row is not None]

    def append_row(self, row: dict[str, Any]) -> None:
        """Append a row, which has a "step", to the log."""
        self.check_lock()
        _append_line(self.metrics, row)

    def truncate_rows(self, step: int, warn: Callable[[str], object] = lambda line: None) -> None:
        """Remove the rows after `step`, which a resumed run writes again.

        `warn` is called with the number of damaged lines, which are removed too. A later row that
        a killed process left incomplete is not counted.
        """
        lines = self._lines()
        rows = [_row(line) for line in lines]
        kept = [number for number, row in enumerate(rows) if row and row["step"] <= step]
        last = kept[-1] if kept else -1
        damaged = sorted(set(range(last)) - set(kept))
        damaged += [number for number in range(last + 1, len(rows)) if rows[number] is None]
        if damaged and damaged[-1] == len(rows) - 1 and _is_begun(lines[-1], step):
            damaged.pop()
        if damaged:
            warn(
                f"{self.metrics}: {len(damaged)} of {len(lines)} lines are not what a run wrote "
                f"and were removed, the first is line {damaged[0] + 1}"
            )
        content = b"".join(lines[number].rstrip(b"\n") + b"\n" for number in kept)
        write_file(self.metrics, content)

    def _lines(self) -> list[bytes]:
        if not self.metrics.exists():
            return []
        with self.metrics.open("rb") as file:
            return file.readlines()


def _append_line(path: Path, content: dict[str, Any]) -> None:
    """Append JSON to a file, on a new line even if a killed process left half of one."""
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(content).encode() + b"\n")


def _row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line of the log, a step and numbers; None if it has none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(type(value) in (int, float) for value in row.values()) else None


def _is_begun(line: bytes, step: int) -> bool:
    """Return whether a line is the beginning of a row after `step`."""
    if found := re.match(rb'{"step": (\d+), [ -~]*$', line):
        return int(found[1]) > step
    return b'{"step": '.startswith(line.rstrip(b"0123456789,"))


def _has_secrets(config: RunConfig) -> bool:
    values = dataclasses.asdict(config)
    return json.dumps(redacted(values)) != json.dumps(values)


def _is_other_rank() -> bool:
    """Return whether a launcher started this process, and other than the first."""
    given = [os.environ.get(name, "") for name in OTHER_RANK]
    return all(given) and given[0].isdecimal() and int(given[0]) > 0 and given[1] != "1"


@contextmanager
def _as_training_error(path: Path) -> Iterator[None]:
    """Convert an error of creating or locking the folder `path` to a TrainingError."""
    try:
        yield
    except BlockingIOError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise TrainingError(
            f"output_dir: expected a folder that can be written, got {str(path)!r:.300}: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from error
