"""Two gloo processes of which one raises: both must end soon, wherever it was.

The rank raises in a random call of a function of this library, from the start of a run to its end.
It then ends, as a command does, or lives on, as a notebook does. Before the processes know each
other, torchrun alone can end the others.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import timm
import torch
import torch.distributed as dist

import elip_models
from elip_models import cli
from tests.fuzz.harness import Loss, kind
from tests.fuzz.interrupt_cases import raise_in_call
from tests.helpers.damage import picture
from tests.helpers.tiny_run import tiny_arguments

PACKAGE = str(Path(elip_models.__file__).parent)
SECONDS = 30  # in which both must end
CALLS = 20_000  # more than a run has


class Raised(Exception):
    """What the rank raises."""


def embed(folder, prepared):
    options = {"batch_size": 2, "shard_size": 2, "workers": 0, "check": 0}
    model = f"timm:test_vit:{prepared / 'vit.pt'}"
    elip_models.embed(model, prepared / "images", folder / "out", **options)


def train(folder, prepared):
    cli.main(tiny_arguments(folder / "run", "optim.steps=2", "optim.batch_size=4"))


RUNS = (embed, embed, embed, train)  # training takes longer


class Rank:
    """A forked process of a run.

    Args:
        number: the rank.
        folder: of the run, with what each rank printed.
        port: of the store of torch.distributed.
        run: called in the process.
    """

    def __init__(self, number, folder, port, run):
        self.output = folder / f"{number}.txt"
        self.process = os.fork()
        if self.process:
            return
        where = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in where.items()})
        with self.output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            run()
            status = 0
        except SystemExit as exit_:
            status = exit_.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def wait(self, words, is_alone=None):
        """Return the exit status; raise Loss if the process does not end in time."""
        end = time.monotonic() + SECONDS
        while not (ended := os.waitpid(self.process, os.WNOHANG))[0]:
            if is_alone is not None and is_alone.is_set():
                os.kill(self.process, signal.SIGKILL)
            if time.monotonic() > end:
                raise Loss(f"a rank waits for more than {SECONDS} s: {words}")
            time.sleep(0.05)
        return os.waitstatus_to_exitcode(ended[1])


def save_inputs(folder):
    (folder / "images").mkdir()
    for i in range(9):
        (folder / "images" / f"{i}.png").write_bytes(picture(i, size=(20, 20)))
    torch.save(timm.create_model("test_vit").state_dict(), folder / "vit.pt")


@kind(share=0.3, prepare=save_inputs, seconds=SECONDS + 20)
def failed_ranks(folder, rng, prepared):
    run, failing = rng.choice(RUNS), rng.randrange(2)
    call, lives_on = int(CALLS ** rng.random()), run is embed and rng.random() < 0.5
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def fail():
        raise_in_call(call, Raised(), PACKAGE)
        try:
            run(folder, prepared)
        except Raised:
            traceback.print_exc()
            if not dist.is_initialized():
                alone.set()
            elif lives_on:
                ended.wait(SECONDS)
            raise

    ended, alone = multiprocessing.Event(), multiprocessing.Event()
    runs = [partial(run, folder, prepared)] * 2
    runs[failing] = fail
    ranks = [Rank(number, folder, port, runs[number]) for number in range(2)]
    words = f"{run.__name__}, rank {failing} raises in call {call}, lives on: {lives_on}"
    statuses = [ranks[1 - failing].wait(words, alone)]
    ended.set()
    statuses.append(ranks[failing].wait(words))
    said = ranks[failing].output.read_text()
    if "Raised" in said:
        return "refused"
    if any(statuses):
        raise Loss(f"exit status {statuses}: {words}: {said[-300:]}")
    return "read"
