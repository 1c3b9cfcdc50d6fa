"""The folder of a run, written so that a process killed at any moment leaves it whole.

    recipe.yaml                  the resolved recipe
    tokenizer/                   the tokenizer, where it was trained on the captions
    metrics.jsonl                a row every `log_every` steps, and one an evaluation
    tensorboard/                 the same, for TensorBoard
    checkpoints/step_00001000/   model, optimiser, random generators; the newest few
    model/                       the trained model and its tokenizer

A checkpoint and a tokenizer are written under a name that nothing reads, and renamed when complete.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elip_models.training.recipe import RunConfig, load_recipe, resume_conflicts, save_recipe

CHECKPOINT_NAME = re.compile(r"step_\d{8,}")
STATE_FILE = "run.json"


class TrainingError(RuntimeError):
    """A run that cannot start, continue or go on; the message says what to do."""


class RunFolder:
    """Paths, log and checkpoints of one run. Several processes may read; one writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.tokenizer = self.path / "tokenizer"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.model = self.path / "model"

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

    def prepare(self) -> None:
        """Makes the folder; what a start that failed left in it goes."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"output_dir: expected a folder that can be made, got {self.path}: {error}"
            ) from error
        if not self.recipe.exists():
            shutil.rmtree(self.tokenizer, ignore_errors=True)

    def claim(self, config: RunConfig) -> None:
        """Writes the recipe: from here on the folder holds a run."""
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

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; None where there is none."""
        complete = self._complete_checkpoints()
        return complete[-1] if complete else None

    def unfinished_checkpoint(self, step: int) -> Path:
        """Where to write the checkpoint of `step`, before `commit_checkpoint`."""
        return self.checkpoints / f".step_{step:08d}"

    def commit_checkpoint(self, step: int, *, keep: int, **invariants: int | list[int]) -> None:
        """Puts the checkpoint of `step` in place, and keeps the `keep` newest.

        `invariants` are numbers, or lists of them, that a run which resumes it must have in common.
        """
        unfinished = self.unfinished_checkpoint(step)
        state = json.dumps({"step": step, "invariants": invariants})
        (unfinished / STATE_FILE).write_text(state, encoding="utf-8")
        final = self.checkpoints / f"step_{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        for old in self._complete_checkpoints()[:-keep]:
            shutil.rmtree(old)

    @staticmethod
    def checkpoint_step(checkpoint: Path, **invariants: int | list[int]) -> int:
        """The step of a checkpoint; TrainingError where it has other `invariants`."""
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        for name, value in invariants.items():
            if state["invariants"].get(name) != value:
                raise TrainingError(
                    f"{checkpoint} cannot be resumed: expected {name} = "
                    f"{state['invariants'].get(name)}, got {value}"
                )
        return state["step"]

    def _complete_checkpoints(self) -> list[Path]:
        """Oldest first; a folder without its state is half-copied or half-removed."""
        complete = [
            folder
            for folder in self.checkpoints.glob("step_*")
            if CHECKPOINT_NAME.fullmatch(folder.name) and (folder / STATE_FILE).is_file()
        ]
        return sorted(complete, key=lambda folder: int(folder.name.removeprefix("step_")))
