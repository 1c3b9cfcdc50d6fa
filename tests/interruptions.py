"""`elip embed` and `elip distill`, killed, doubled, and on a full disk, at random moments.

    python -m tests.interruptions --kills 40 --moments 16 --seed 0

A run that nothing disturbs is compared with one that SIGKILL ends again and again, and with one
whose disk is filled before one of its writes. What must hold: a second run in the same folder is
refused, a full disk is one line with the exit status 2, and the files of a run that was continued
are those of the undisturbed one.
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch

from elip_models.recovery import distill
from tests.full_disk import Run, check_refused, disk, fill
from tests.helpers.damage import picture

IMAGES = 16
COMMANDS = {
    "embed": "embed images --model {model} --output {output} --batch-size 2 --shard-size 2 "
    "--workers 0 --check 0",
    "distill": "distill {model} images --output {output} --steps 8 --batch-size 2",
}
BUSY = "expected a folder that no other run uses"


def prepare(root):
    """Write the images and the model, and make `root` the working folder."""
    os.chdir(root)
    Path("images").mkdir()
    for i in range(IMAGES):
        Path("images", f"{i}.png").write_bytes(picture(i, size=(40 + i, 30)))
    Path("images", "broken.png").write_bytes(b"")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), "vit.pt")


def begin(command, folder, before=lambda: None):
    """Return the process of a command that writes `folder`/out."""
    arguments = COMMANDS[command].format(model="timm:test_vit:vit.pt", output=folder / "out")
    return Run(arguments.split(), before)


def files_in(folder):
    paths = sorted(path for path in (folder / "out").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def check_whole(folder, expected, status, said):
    """Raise AssertionError unless a run ended well, with the files of the undisturbed one."""
    files = {name: content for name, content in files_in(folder).items() if "/.lock" not in name}
    others = sorted({*files, *expected} - {n for n in files if files[n] == expected.get(n)})
    if status or others:
        raise AssertionError(f"exit status {status}, other files: {others}\n{said[-3000:]}")


def killed(root, command, expected, seconds, count, rng):
    """Kill runs `count` times, start others beside them, and compare those that end."""
    folder, runs, refused = None, 0, 0
    for number in range(count):
        if folder is None:
            folder, runs = root / f"{command}{number}", runs + 1
            folder.mkdir()
        run = begin(command, folder)
        time.sleep(rng.uniform(0, seconds))
        run.send(signal.SIGSTOP)
        if number % 4 == 0:
            other = begin(command, folder).end()
            if BUSY in other[1]:
                check_refused(*other, BUSY)
                refused += 1
            elif not other[0]:  # the first had no lock yet
                check_whole(folder, expected, *other)
        run.send(signal.SIGKILL)
        status, said = run.end()
        if not status:  # it had ended before
            check_whole(folder, expected, status, said)
        if expected.keys() <= files_in(folder).keys():
            folder = None
    if folder is not None:
        check_whole(folder, expected, *begin(command, folder).end())
    return f"{count} kills of {runs} runs, {refused} second runs refused, the same files"


def filling(folder, call, left):
    """Return a function that fills the disk of a folder before one of its writes."""

    def before():
        open_, calls = os.open, []

        def opened(path, flags, *arguments, **options):
            if flags & os.O_EXCL and str(folder) in str(path):
                calls.append(path)
                if len(calls) == call:
                    fill(folder, left)
            return open_(path, flags, *arguments, **options)

        os.open = opened

    return before


def on_full_disk(command, expected, call, left):
    """Fill the disk before a write; return whether the command met it."""
    with disk() as folder:
        status, said = begin(command, folder, filling(folder, call, left)).end()
        if not status:  # it has fewer writes
            check_whole(folder, expected, status, said)
            return False
        check_refused(status, said, str(folder))
        (folder / "filler").unlink(missing_ok=True)
        check_whole(folder, expected, *begin(command, folder).end())
    return True


def interrupt(root, command, kills, moments, seed):
    """Interrupt a command in every way; yield lines of what was seen.

    Raises:
        AssertionError: something did not hold, with the end of what the command printed.
    """
    rng, whole = random.Random(f"{seed} {command}"), root / "whole"
    whole.mkdir(exist_ok=True)
    start = time.monotonic()
    status, said = begin(command, whole).end()
    seconds = time.monotonic() - start
    expected = {n: content for n, content in files_in(whole).items() if "/.lock" not in n}
    check_whole(whole, expected, status, said)
    (whole / "out").rename(root / f"{command}_whole")
    yield killed(root, command, expected, seconds, kills, rng)
    met = [on_full_disk(command, expected, i + 1, rng.choice((0, 99))) for i in range(moments)]
    yield f"{sum(met)} of {moments} full disks, one line each, the same files after that"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="of each command")
    parser.add_argument("--moments", type=int, default=16, help="full disks of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS, nargs="*", default=COMMANDS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no threads of its parent
    distill.SAVE_EVERY = 1
    with TemporaryDirectory() as root:
        prepare(root)
        for command in options.only:
            lines = interrupt(Path(root), command, options.kills, options.moments, options.seed)
            for line in lines:
                sys.stdout.write(f"{command}: {line}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
