"""Runs that are killed again and again: python -m tests.kills --count 40

Of each recipe, in one process and in two under torchrun, and of a model that two share: a run that
nothing disturbs, and one that SIGKILL ends at random steps, every second time while a checkpoint is
being written. `--resume` takes it up, of two processes torchrun itself, when one of them is killed.
What must hold: the same losses in the log, and the same bits in the saved weights.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil

from tests.helpers.tiny_run import logged, tiny_arguments

STEPS, SECONDS = 60, 180  # of a run; until a step or a save must have come
NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # else restarted processes may hang
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", NO_SHARED_STORE: "1"}
OPTIONS = (f"optim.steps={STEPS}", "checkpoint_every=3", "keep_checkpoints=2")


class Case(NamedTuple):
    """A recipe, in so many processes, with these options."""

    recipe: str
    processes: int = 1
    options: tuple[str, ...] = ()

    def __str__(self):
        return ", ".join((self.recipe, f"{self.processes} processes", *self.options))


CASES = [Case(recipe, count) for count in (1, 2) for recipe in ("clip_tiny", "albef_tiny")]
CASES.append(Case("clip_tiny", 2, ("optim.shard=true",)))


def start(folder, case, restarts):
    """The run of a folder, begun or taken up."""
    command = [sys.executable, "-m"]
    if case.processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}"]
        command += [f"--max-restarts={restarts}", "-m"]
    options = tiny_arguments(folder, *OPTIONS, *case.options, recipe=case.recipe)
    command += ["elip_models.cli", *options, "--resume"]
    with (folder.parent / f"{folder.name}.txt").open("ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env=ENVIRONMENT)


def last_step(folder):
    """The newest step in its log."""
    log = folder / "metrics.jsonl"
    rows = log.read_text().rpartition("\n")[0] if log.exists() else ""
    return int(rows.rpartition('"step": ')[2].partition(",")[0]) if '"step": ' in rows else 0


def is_saving(folder):
    return any((folder / "checkpoints").glob(".step_*"))


def wait_until(condition, process):
    end = time.monotonic() + SECONDS
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended with {process.returncode} before it was killed")
        if time.monotonic() > end:
            raise AssertionError(f"nothing came for {SECONDS} s")
        time.sleep(0.002)


def ranks(process):
    """The training processes, of which torchrun is the parent where there are several."""
    if "torch.distributed.run" not in process.args:
        return [process.pid]
    return [child.pid for child in psutil.Process(process.pid).children()]


def are_others(process, before):
    """It has ranks again, as many as before, and none of those."""
    now = set(ranks(process))
    return len(now) == len(before) and not before & now


def killed(folder, case, count, rng):
    """Kill a run `count` times, and let it end; how many of them met a checkpoint half written."""
    targets = sorted(rng.sample(range(1, STEPS - 6), count))
    process, met = start(folder, case, count), 0
    try:
        for number, target in enumerate(targets):
            wait_until(lambda target=target: last_step(folder) >= target, process)
            if number % 2:
                wait_until(lambda: is_saving(folder), process)
            before = set(ranks(process))
            os.kill(rng.choice(sorted(before)), signal.SIGKILL)
            met += is_saving(folder)
            if case.processes == 1:
                process.wait()
                process = start(folder, case, count)
            else:
                wait_until(partial(are_others, process, before), process)
        if process.wait(SECONDS) != 0:
            raise AssertionError(f"the run ended with {process.returncode}")
    finally:
        process.terminate()  # torchrun ends its ranks; nothing where it has ended
    return met


def compare(root, case, count, seed):
    """One run whole, and one that is killed `count` times -> how often in the middle of a save.

    Raises:
        AssertionError: they differ, with the end of what the killed one said.
    """
    whole, broken = root / "whole", root / "killed"
    for folder in (whole, broken):
        folder.mkdir()
    try:
        if start(whole, case, 0).wait(SECONDS) != 0:
            raise AssertionError("the undisturbed run failed")
        met = killed(broken, case, count, random.Random(f"{seed} {case.recipe}"))
        losses = [logged(folder, "loss", "step") for folder in (whole, broken)]
        weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, broken)]
        if len(losses[0]) != STEPS or losses[0] != losses[1] or weights[0] != weights[1]:
            raise AssertionError("other losses or weights than those of the undisturbed run")
    except (AssertionError, OSError, psutil.Error, subprocess.TimeoutExpired) as error:
        said = (root / f"{broken.name}.txt").read_text(errors="replace")[-3000:]
        raise AssertionError(f"{case}: {error}\n{said}") from error
    return met


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=40, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = -(-options.count // len(CASES))
    for case in CASES:
        with TemporaryDirectory() as root:
            met = compare(Path(root), case, count, options.seed)
        words = f"{case}: {count} kills, {met} of them within a save"
        sys.stdout.write(f"{words}: the same losses and the same weights\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
