"""The folder of a run, written so that a process killed at any moment leaves it whole.

    recipe.yaml                  the resolved recipe
    origin.jsonl                 versions, commit, command and data, a line each time it began
    tokenizer/                   the tokenizer, where it was trained on the captions
    metrics.jsonl                a row every `log_every` steps, and one an evaluation
    tensorboard/                 the same, for TensorBoard
    checkpoints/step_00001000/   model, optimiser, random generators, whole or in shards; the newest
                                 few complete ones
    model/                       the trained model and its tokenizer

A checkpoint and a tokenizer are written under a name that nothing reads, and renamed when complete.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elip_models.models.io.files import write_file
from elip_models.training.errors import TrainingError
from elip_models.training.recipe import load_recipe, resume_conflicts, save_recipe
from elip_models.training.run_checkpoints import Checkpoints
from elip_models.training.run_config import RunConfig
from elip_models.validation import require_extra

with require_extra("elip_models.training"):
    from filelock import FileLock, Timeout


class RunFolder:
    """Paths, log and checkpoints of one run. Several processes may read; one writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.tokenizer = self.path / "tokenizer"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.metrics = self.path / "metrics.jsonl"
        self.origin = self.path / "origin.jsonl"
        self.model = self.path / "model"
        self._owner = self.path / ".owner"

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Raises TrainingError for a run that is not to be resumed, or one of another recipe."""
        if not self.recipe.exists():
            return
        if not resume:
            raise TrainingError(
                f"{self.path} already holds a run: continue it with --resume, "
                "or set another output_dir"
            )
        if conflicts := resume_conflicts(load_recipe(self.recipe), config):
            raise TrainingError(
                f"{self.path} cannot be resumed with another recipe: {'; '.join(conflicts)}"
            )

    @contextmanager
    def held(self, config: RunConfig, *, resume: bool) -> Iterator[None]:
        """Inside, the folder is this run's alone; it is made where it is not there.

        Of several processes the first holds it for all.

        Raises:
            TrainingError: another run holds it, the folder cannot be made, or `check` does.
        """
        self.check(config, resume=resume)
        if int(os.environ.get("RANK", "0")) > 0:
            yield
            return
        made = [each for each in (self.path, *self.path.parents) if not each.exists()]
        self.make()
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            with _writes(self.path):
                lock.acquire()
        except Timeout:
            raise TrainingError(
                f"{self.path} is in use by {self._holder()}: wait until it ends, or set another "
                "output_dir"
            ) from None
        try:
            self.check(config, resume=resume)  # another run may have come and gone
            write_file(self._owner, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            self._owner.unlink(missing_ok=True)
            lock.release()
            if made and not self.recipe.exists():
                self._unmake(made)

    def _holder(self) -> str:
        """Who holds the folder, in words."""
        try:
            return self._owner.read_text(encoding="utf-8")
        except OSError:
            return "another run"

    def make(self) -> None:
        """Makes the folder; TrainingError where that cannot be."""
        with _writes(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def _unmake(self, made: list[Path]) -> None:
        """Removes what a run made that failed before it began, unless something else is there."""
        shutil.rmtree(self.tokenizer, ignore_errors=True)
        with suppress(OSError):
            if [each.name for each in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
            for folder in made:
                folder.rmdir()

    def prepare(self) -> None:
        """The folder is there, and what a start that failed left in it goes."""
        self.make()
        if not self.recipe.exists():
            shutil.rmtree(self.tokenizer, ignore_errors=True)

    def claim(self, config: RunConfig, origin: dict[str, Any]) -> None:
        """Writes where the run comes from, a line each time it is begun or resumed, and the recipe:
        from here on the folder holds a run.
        """
        with self.origin.open("a", encoding="utf-8") as file:
            file.write(json.dumps(origin) + "\n")
        save_recipe(config, self.recipe)

    def save_tokenizer(self, save: Callable[[Path], Any]) -> None:
        """Calls `save(folder)`, and puts the folder in place when it is complete."""
        temporary = self.path / ".tokenizer"
        save(temporary)
        os.replace(temporary, self.tokenizer)

    def rows(self) -> list[dict[str, Any]]:
        """The log; a line that a killed process left half-written ends it."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def append_row(self, row: dict[str, Any]) -> None:
        """Adds a row, which holds a "step", to the log."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def truncate_rows(self, step: int) -> None:
        """Drops the rows after `step`, which a resumed run writes again."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.metrics)


@contextmanager
def _writes(path: Path) -> Iterator[None]:
    """Inside, what the system does not allow in the folder `path` is a TrainingError."""
    try:
        yield
    except Timeout:  # an OSError too
        raise
    except OSError as error:
        raise TrainingError(
            f"output_dir: expected a folder that can be written, got {path}: {error}"
        ) from error
