"""Runs whose disk is full at one of its moments: python -m tests.full_disk

A run fills its disk just before it writes something: a tmpfs where this user may mount one, else
files of this process are limited to a size. What must hold: one line on standard error, an exit
status, a checkpoint that is whole, and after space was freed the same losses and weights as those
of a run that nothing disturbed.
"""

import argparse
import errno
import os
import pkgutil
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
from tests.helpers.tiny_run import logged, tiny_arguments

OPTIONS = ("optim.steps=6", "checkpoint_every=2", "trackers=[tensorboard]")
MEBIBYTES = 64


class Moment(NamedTuple):
    """Before which call of a function the disk is filled, up to so many bytes."""

    function: str
    call: int = 1
    left: int = 0
    report: str = ""


SAVE = "accelerate.checkpointing:save"  # of a checkpoint: weights, optimiser
MOMENTS = {
    "tokenizer": Moment("transformers:PreTrainedTokenizerBase.save_pretrained"),
    "row": Moment("accelerate:Accelerator.log", 3),
    "first checkpoint": Moment(SAVE, 1),
    "weights": Moment(SAVE, 3, left=20480),
    "optimizer": Moment(SAVE, 4, left=20480),
    "random states": Moment("accelerate.checkpointing:torch.save", 4),
    "rename": Moment("os:replace", 2),
    "model": Moment("elip_models.pretraining.models.base:PretrainedModel.save_pretrained"),
    "timing": Moment("elip_models.pretraining.training.report:write_json", report="timing"),
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


def fill_at(moment, folder):
    """Fill the disk before a call of a function."""
    owner, _, name = moment.function.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(owner)
    function, calls = getattr(owner, name), []
    is_rename = name == "replace"

    def filling(*positional, **named):
        if not is_rename or Path(positional[1]).name.startswith("step_"):
            calls.append(name)
        if len(calls) == moment.call:
            fill(folder, moment.left)
            if is_rename:  # a new name needs space in a folder that is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *positional[:1])
        return function(*positional, **named)

    setattr(owner, name, filling)


class Run:
    """The command `elip` in a forked process, since imports take seconds."""

    def __init__(self, arguments, before=lambda: None):
        self.said = TemporaryFile("w+")  # noqa: SIM115, `end` closes it
        self.process = os.fork()
        if self.process:
            return
        os.dup2(self.said.fileno(), 1)
        os.dup2(self.said.fileno(), 2)
        status = 1
        try:
            before()
            cli.main(arguments)
        except SystemExit as exit_:
            status = exit_.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def send(self, number):
        os.kill(self.process, number)

    def end(self):
        """Wait for the process; return its exit status, negative for a signal, and its output."""
        _, status = os.waitpid(self.process, 0)
        with self.said as file:
            file.seek(0)
            return os.waitstatus_to_exitcode(status), file.read()


def check_refused(status, said, text):
    """Return the line with which a run ended; raise AssertionError unless it is one with a text."""
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if status != 2 or len(errors) != 1 or text not in errors[0] or "Traceback" in said:
        raise AssertionError(f"exit status {status}, without {text!r}: {said[-3000:]}")
    return errors[0]


def train(folder, *options, before=lambda: None):
    return Run(tiny_arguments(folder / "run", *OPTIONS, *options), before).end()


def check(folder, name, whole):
    """A disk that is full at a moment; returns the line that was printed."""
    reports = [f"report=[{MOMENTS[name].report}]"]
    before = partial(fill_at, MOMENTS[name], folder)
    error = check_refused(*train(folder, *reports, before=before), str(folder))
    (folder / "filler").unlink(missing_ok=True)
    checkpoints = folder / "run" / "checkpoints"
    is_saved = name not in ("tokenizer", "first checkpoint")
    assert any(checkpoints.glob("step_*")) == is_saved, f"{name}: {list(checkpoints.iterdir())}"
    status, said = train(folder, *reports, "--resume")
    assert status == 0, f"{name}: not resumed: {said[-3000:]}"
    pairs = folder / "run", whole / "run"
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in pairs]
    rows = [logged(run, "loss", "step") for run in pairs]
    assert weights[0] == weights[1] and rows[0] == rows[1], f"{name}: other losses or weights"
    assert not list(checkpoints.glob(".*")), f"{name}: a checkpoint is left half-written"
    return error


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
    report.ROUNDS = 1
    with TemporaryDirectory() as whole:
        status, said = train(Path(whole))
        assert status == 0, said
        for name in options.only:
            with disk() as folder:
                line = check(folder, name, Path(whole))
            sys.stdout.write(f"{name}: {line}; resumed: the same losses and the same weights\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
