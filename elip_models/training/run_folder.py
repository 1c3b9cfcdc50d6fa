"""The folder of a run, which stays consistent if the process is killed at any moment.

    recipe.yaml                  the resolved recipe
    provenance.jsonl             versions, commit, command and data, one line for each start
    tokenizer/                   the tokenizer, if it was trained on the captions
    metrics.jsonl                a row every `log_every` steps, and one for each evaluation
    tensorboard/                 the same for TensorBoard
    checkpoints/step_00001000/   the newest checkpoints: model, optimiser, random generators
    model/                       the trained model and its tokenizer

A checkpoint and a tokenizer are written under a hidden name and renamed when complete.
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
        self._owner = self.path / ".owner"

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Raise TrainingError if a run of `config` cannot start or resume in this folder."""
        if not self.recipe.exists():
            return
        if not resume:
            raise TrainingError(
                f"{self.path} already contains a run: continue it with --resume, "
                "or set another output_dir"
            )
        if conflicts := resume_conflicts(load_recipe(self.recipe), config):
            raise TrainingError(
                f"{self.path} cannot be resumed with another recipe: {'; '.join(conflicts)}"
            )

    @contextmanager
    def locked(self, config: RunConfig, *, resume: bool) -> Iterator[None]:
        """Check and lock the folder for this run, and create it if necessary.

        The first of several processes locks it for all. If another run uses the folder, or it
        cannot be created, TrainingError is raised.
        """
        self.check(config, resume=resume)
        if int(os.environ.get("RANK", "0")) > 0:
            yield
            return
        created = [each for each in (self.path, *self.path.parents) if not each.exists()]
        self.create()
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            with _as_training_error(self.path):
                lock.acquire()
        except Timeout:
            raise TrainingError(
                f"{self.path} is in use by {self._describe_owner()}: wait until it ends, or set "
                "another output_dir"
            ) from None
        try:
            self.check(config, resume=resume)  # again, another run may have ended just before
            write_file(self._owner, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            self._owner.unlink(missing_ok=True)
            lock.release()
            if created and not self.recipe.exists():
                self._remove_created(created)

    def _describe_owner(self) -> str:
        try:
            return self._owner.read_text(encoding="utf-8")
        except OSError:
            return "another run"

    def create(self) -> None:
        """Create the folder; raise TrainingError if that fails."""
        with _as_training_error(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def _remove_created(self, created: list[Path]) -> None:
        """Remove what a run created that failed before its start, unless other files are there."""
        shutil.rmtree(self.tokenizer, ignore_errors=True)
        with suppress(OSError):
            if [each.name for each in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
            for folder in created:
                folder.rmdir()

    def prepare(self) -> None:
        """Create the folder and remove what a failed start left in it."""
        self.create()
        if not self.recipe.exists():
            shutil.rmtree(self.tokenizer, ignore_errors=True)

    def record_start(self, config: RunConfig, provenance: dict[str, Any]) -> None:
        """Append a line of provenance and write the recipe: the folder now contains a run."""
        with self.provenance.open("a", encoding="utf-8") as file:
            file.write(json.dumps(provenance) + "\n")
        save_recipe(config, self.recipe)

    def save_tokenizer(self, save: Callable[[Path], Any]) -> None:
        """Call `save(folder)` with a temporary folder, and rename it when complete."""
        temporary = self.path / ".tokenizer"
        save(temporary)
        os.replace(temporary, self.tokenizer)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the log up to the first incomplete line of a killed process."""
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
        """Append a row, which has a "step", to the log."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def truncate_rows(self, step: int) -> None:
        """Remove the rows after `step`, which a resumed run writes again."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        write_file(self.metrics, "".join(kept).encode())


@contextmanager
def _as_training_error(path: Path) -> Iterator[None]:
    """Convert an OSError of writing in the folder `path` to a TrainingError."""
    try:
        yield
    except Timeout:  # a subclass of OSError
        raise
    except OSError as error:
        raise TrainingError(
            f"output_dir: expected a folder that can be written, got {path}: {error}"
        ) from error
