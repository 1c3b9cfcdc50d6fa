"""The folder of a run, which stays consistent if the process is killed at any moment.

recipe.yaml                  the resolved recipe; a folder that has it contains a run
provenance.jsonl             versions, commit and command, one line for each start
tokenizer/                   the tokenizer, if it was trained on the captions
metrics.jsonl                a row every `log_every` steps, and one for each evaluation
tensorboard/                 the same for TensorBoard
checkpoints/step_00001000/   the newest checkpoints: model, optimiser, random generators
model/                       the trained model and its tokenizer
best/                        those of the step that was selected on the validation split
"""

import dataclasses
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from elip_models.pretraining.data.streams import redacted
from elip_models.pretraining.training.recipe import load_recipe, resume_conflicts, save_recipe
from elip_models.pretraining.training.run_checkpoints import Checkpoints
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.profiling.commit import commit
from elip_models.profiling.measure import installed_versions
from elip_models.saving.files import write_file
from elip_models.saving.locked_folder import locked_folder
from elip_models.saving.saved_folder import publish, restore_replaced, unfinished
from elip_models.validation import ConfigError, TrainingError

PACKAGES = ("elip-kernels", "timm", "transformers", "accelerate", "datasets", "peft")
_CODES = "|".join(
    str(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
)
UNWRITABLE = re.compile(
    rf"\[Errno ({_CODES})\]|\(os error ({_CODES}|112)\)|\[WinError 112\]"
    "|PytorchStreamWriter|inline_con"
)
"""Errors of a disk that is full (112 on Windows), over a quota or a limit, damaged or read-only: of
the operating system, of writers in Rust, and of PyTorch's writer."""


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

    @contextmanager
    def locked(self, config: RunConfig, *, resume: bool) -> Iterator[None]:
        """Create the folder, lock it against other runs, and check that `config` can run in it.

        TrainingError is raised if another run uses it, if it cannot be written, or if it contains
        something else. A run that fails before its start leaves nothing.
        """
        is_new = not os.path.exists(self.path)
        leftovers = rf"\.{self.tokenizer.name}|\.{self.recipe.name}\.\d+\.\d+"
        options = {"marker": self.recipe.name, "leftovers": leftovers, "error": TrainingError}
        with locked_folder(self.path, "output_dir", **options):
            try:
                self.check(config, resume=resume)
                yield
            finally:
                if is_new and not self.recipe.is_file():
                    shutil.rmtree(unfinished(self.tokenizer), ignore_errors=True)

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Raise TrainingError if a run of `config` cannot start or resume in this folder."""
        if not self.recipe.is_file():
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

    def prepare(self) -> None:
        """Remove what a killed run left half-written in the folder."""
        self.checkpoints.remove_unfinished()
        restore_replaced(self.best)
        restore_replaced(self.tokenizer)

    def record_start(self, config: RunConfig, provenance: dict[str, Any]) -> None:
        """Write the recipe and append a line of provenance: the folder now contains a run.

        A recipe with a password, or with a URL that has a query, is readable by its owner only.
        """
        values = dataclasses.asdict(config)
        has_secrets = json.dumps(redacted(values)) != json.dumps(values)
        save_recipe(config, self.recipe, mode=0o600 if has_secrets else None)
        _append_line(self.provenance, provenance)
        if unfinished(self.tokenizer).exists():
            publish(self.tokenizer)

    def trained_tokenizer(self) -> Path:
        """Return the folder of the run's tokenizer; before the start, it is a hidden one."""
        return self.tokenizer if self.tokenizer.exists() else unfinished(self.tokenizer)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the log, without half of a row that a killed run left at its end."""
        if not self.metrics.exists():
            return []
        *lines, _ = self.metrics.read_bytes().split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise TrainingError(
                f"{self.metrics}: expected rows that a run wrote, got a damaged line ({error}): "
                "remove this line to continue"
            ) from error

    def append_row(self, row: dict[str, Any]) -> None:
        """Append a row, which has a "step", to the log."""
        _append_line(self.metrics, row)

    def truncate_rows(self, step: int) -> None:
        """Remove the rows after `step`, which a resumed run writes again."""
        rows = [row for row in self.rows() if row["step"] <= step]
        write_file(self.metrics, b"".join(map(_line, rows)))


def _append_line(path: Path, content: dict[str, Any]) -> None:
    """Append a line of JSON, after a line that a full disk or a kill left without its end."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(_line(content))


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def run_provenance(num_samples: int, checkpoint: Path | None) -> dict[str, Any]:
    """Return time, command, versions, commit and samples of a run that starts or resumes."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed": None if checkpoint is None else checkpoint.name,
        "command": redacted(sys.argv),
        # torch names its build, such as 2.13.0+cpu, which its package does not
        "versions": {"torch": torch.__version__, **installed_versions(PACKAGES)},
        "commit": commit(),
        "samples": num_samples,
    }


@contextmanager
def as_write_error(path: Path) -> Iterator[None]:
    """Convert an error of writing below `path`, such as a full disk, to TrainingError.

    Other errors pass.
    """
    try:
        yield
    except TrainingError:
        raise
    except BaseException as error:  # that of torch.distributed.checkpoint is no Exception
        if not UNWRITABLE.search(str(error)):
            raise
        raise TrainingError(
            f"{path}: the run ended, since a file could not be written "
            f"({str(error).splitlines()[0]}): free or allow space, then continue from the last "
            "checkpoint with --resume"
        ) from error
