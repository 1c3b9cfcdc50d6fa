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
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple

import torch

from elip_models import cli
from elip_models.pretraining.training import report
from elip_models.pretraining.training.run_folder import RunFolder
from tests.helpers.tiny_run import logged, tiny_arguments

OPTIONS = ("optim.steps=6", "checkpoint_every=2", "trackers=[tensorboard]")
MEBIBYTES = 64


class Moment(NamedTuple):
    """Before which call of a function the disk is filled, up to so many bytes."""

    function: str
    call: int = 1
    left: int = 0
    report: str = ""


FOLDER = "elip_models.pretraining.training.run_folder:RunFolder"
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
    "manifest": Moment("elip_models.pretraining.training.run_checkpoints:_digest", 2),
    "rename": Moment("elip_models.pretraining.training.run_checkpoints:os.replace", 2),
    "model": Moment(
        "elip_models.pretraining.models.base:PretrainedModel.save_pretrained", left=20480
    ),
    "saved tokenizer": Moment("elip_models.pretraining.models.base:write_json"),
    "timing": Moment("elip_models.pretraining.training.report:_timing_table", report="timing"),
    "picture": Moment("elip_models.pretraining.training.report:draw_reduction", report="picture"),
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


def run_with(name, folder, arguments):
    """Run a command in this process, whose disk is full from a moment on, if one is named."""
    if name is not None:
        fill_at(MOMENTS[name], folder)
    report.ROUNDS = 1
    cli.main(arguments)


def fill_at(moment, folder):
    """Fill the disk before a call of a function."""
    module, _, path = moment.function.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    function, calls = getattr(owner, name), []

    def filling(*positional, **named):
        is_rename = name == "replace"
        if not is_rename or Path(positional[1]).name.startswith("step_"):
            calls.append(name)
        if len(calls) == moment.call:
            fill(folder, moment.left)
            if is_rename:  # a new name needs space in a folder that is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *positional[:1])
        return function(*positional, **named)

    setattr(owner, name, filling)


def elip(folder, *options, moment=None):
    """Status and standard error of a run, in a forked process, since imports take seconds."""
    arguments = tiny_arguments(folder / "run", *OPTIONS, *options)
    with TemporaryFile("w+") as said:
        process = os.fork()
        if process == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            _end_with(partial(run_with, moment, folder, arguments))
        _, status = os.waitpid(process, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read()


def _end_with(run):
    status = 1
    try:
        run()
    except SystemExit as exit:
        status = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def check(folder, name, whole):
    """A disk that is full at a moment; returns the line that was printed."""
    moment = MOMENTS[name]
    reports = [f"report=[{moment.report}]"]
    status, said = elip(folder, *reports, moment=name)
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if status != 2 or len(errors) != 1 or str(folder) not in errors[0] or "Traceback" in said:
        raise AssertionError(f"{name}: exit status {status}: {said[-3000:]}")
    (folder / "filler").unlink(missing_ok=True)
    found = RunFolder(folder / "run").checkpoints
    is_saved = name not in ("tokenizer", "recipe", "first row", "first checkpoint")
    assert (found.latest() is not None) == is_saved, f"{name}: {found.latest()} is the last"
    status, said = elip(folder, *reports, "--resume")
    assert status == 0, f"{name}: not resumed: {said[-3000:]}"
    pairs = folder / "run", whole / "run"
    weights = [(each / "model" / "model.safetensors").read_bytes() for each in pairs]
    rows = [logged(each, "loss", "step") for each in pairs]
    assert weights[0] == weights[1] and rows[0] == rows[1], f"{name}: other losses or weights"
    assert not list(found.path.glob(".*")), f"{name}: a checkpoint is left half-written"
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
    options = parser.parse_args()
    torch.set_num_threads(1)
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
