"""Runs whose disk is full at one of its moments: python -m tests.full_disk

A run fills its disk just before it writes something: a tmpfs where this user may mount one, else
files of this process are limited to a size. What must hold: one line on standard error, an exit
status, a checkpoint that is whole, and after space was freed the same losses and weights as those
of a run that nothing disturbed.
"""

import argparse
import errno
import importlib
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from elip_models.training.run_folder import RunFolder
from tests.helpers.tiny_run import logged, tiny_arguments

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OPTIONS = ("optim.steps=6", "checkpoint_every=2", "trackers=[tensorboard]")
MEBIBYTES = 64
FULL = "FULL"
"""The environment variable with a moment and what is to be filled."""


class Moment(NamedTuple):
    """Before which call of a function the disk is filled, up to so many bytes."""

    function: str
    call: int = 1
    left: int = 0
    report: str = ""

    def __str__(self):
        return f"{self.function.rpartition(':')[2]}, call {self.call}"


FOLDER = "elip_models.training.run_folder:RunFolder"
SAVE = "accelerate.checkpointing:save"  # of a checkpoint: weights, optimiser
MOMENTS = {
    "tokenizer": Moment(f"{FOLDER}.train_tokenizer"),
    "recipe": Moment(f"{FOLDER}.record_start"),
    "first row": Moment(f"{FOLDER}.append_row"),
    "later row": Moment(f"{FOLDER}.append_row", 4),
    "tensorboard": Moment("accelerate:Accelerator.log", 3),
    "weights": Moment(SAVE, 3, left=20480),
    "optimizer": Moment(SAVE, 4, left=20480),
    "random states": Moment("accelerate.checkpointing:torch.save", 4),
    "first checkpoint": Moment(SAVE, 1),
    "manifest": Moment("elip_models.training.run_checkpoints:_digest", 2),
    "rename": Moment("elip_models.training.run_checkpoints:os.replace", 2),
    "model": Moment("elip_models.models.base:PretrainedModel.save_pretrained", left=20480),
    "saved tokenizer": Moment("elip_models.models.base:write_json"),
    "timing": Moment("elip_models.training.report:_timing_table", report="timing"),
    "picture": Moment("elip_models.training.report:draw_reduction", report="picture"),
}


def fill(folder, left):
    """Fill the disk of a folder but for `left` bytes, or limit the size of files to that."""
    if not os.path.ismount(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
        return
    with open(f"{folder}/filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - left))


def run_with(moment, folder, arguments):
    """Run a command in this process, whose disk is full from a moment on."""
    module, _, path = moment.function.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    function, calls = getattr(owner, name), []

    def filling(*positional, **named):
        calls.append(name)
        if len(calls) == moment.call:
            fill(folder, moment.left)
            if name == "replace":  # a new name needs space in a folder that is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *positional[:1])
        return function(*positional, **named)

    setattr(owner, name, filling)
    if moment.report:
        importlib.import_module("elip_models.training.report").ROUNDS = 1
    from elip_models.cli import main

    main(arguments)


def elip(folder, *options, moment=None):
    """Status and standard error of a run."""
    arguments = tiny_arguments(folder / "run", *OPTIONS, *options)
    module = ["elip_models.cli"] if moment is None else ["tests.full_disk", "--at", moment]
    module += [] if moment is None else ["--folder", str(folder), "--"]
    command = [sys.executable, "-m", *module, *arguments]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    return ended.returncode, ended.stderr


def check(folder, name, whole):
    """A disk that is full at a moment; returns the line that was printed."""
    moment = MOMENTS[name]
    reports = [f"report=[{moment.report}]"]
    status, said = elip(folder, *reports, moment=name)
    lines = [line for line in said.splitlines() if "Warning" not in line and line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    if status != 2 or len(errors) != 1 or "Traceback" in said:
        raise AssertionError(f"{name}: exit status {status}: {said[-3000:]}")
    (folder / "filler").unlink(missing_ok=True)
    found = RunFolder(folder / "run").checkpoints
    if found.path.exists() and moment.call > 2:
        assert found.latest() is not None, f"{name}: no checkpoint is left"
    status, said = elip(folder, *reports, "--resume")
    assert status == 0, f"{name}: not resumed: {said[-3000:]}"
    pairs = folder / "run", whole / "run"
    weights = [(each / "model" / "model.safetensors").read_bytes() for each in pairs]
    rows = [logged(each, "loss", "step") for each in pairs]
    assert weights[0] == weights[1] and rows[0] == rows[1], f"{name}: other losses or weights"
    assert not list(found.path.glob(".*")), f"{name}: a checkpoint is left half written"
    return errors[0]


@contextmanager
def disk():
    """A folder, on a file system of its own where this user may mount one."""
    with TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={MEBIBYTES}m", "tmpfs", folder]
        is_mounted = subprocess.run(command, capture_output=True).returncode == 0
        try:
            yield Path(folder)
        finally:
            if is_mounted:
                subprocess.run(["umount", folder], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=MOMENTS, choices=MOMENTS)
    parser.add_argument("--at", choices=MOMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.at:
        run_with(MOMENTS[options.at], options.folder, options.arguments)
    with TemporaryDirectory() as whole:
        status, said = elip(Path(whole))
        assert status == 0, said
        for name in options.only:
            with disk() as folder:
                line = check(folder, name, Path(whole))
            sys.stdout.write(f"{name}: {line}; resumed: the same losses and the same weights\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
