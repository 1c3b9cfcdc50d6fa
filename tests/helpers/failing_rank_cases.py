"""Two processes, one of which fails: both end with its error, long before a timeout."""

import os
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import pytest
import torch.distributed as dist

import elip_models
from elip_models.embedding import run as embedding
from elip_models.embedding.shard import Job
from elip_models.pretraining.training import trainer
from elip_models.pretraining.training.evaluation import Evaluation
from elip_models.pretraining.training.run_checkpoints import Checkpoints
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.rank_barrier import RankBarrier
from elip_models.validation import ConfigError
from tests.helpers.damage import picture
from tests.helpers.sharded_cases import OF_PROCESSES, shared_folder
from tests.helpers.tiny_run import own_process, tiny_config

MESSAGE = "steps: expected a process that works"
LONGEST = 30  # seconds; the groups wait for 60


def fails(*arguments, **options):
    raise ConfigError(MESSAGE)


@contextmanager
def ends_together(rank):
    """The block raises the error of the failing process on both, and soon."""
    environment = {**OF_PROCESSES, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    start = time.monotonic()
    with (
        mock.patch.dict(os.environ, environment),
        own_process(),
        pytest.raises(ConfigError, match=MESSAGE),
    ):
        yield
    assert time.monotonic() - start < LONGEST
    dist.barrier()


def failure(rank, where, owner, name):
    """A patch that makes a function fail on the process `where`."""
    return mock.patch.object(owner, name, fails) if rank == where else nullcontext()


def barrier(rank, where):
    with ends_together(rank):
        own = RankBarrier()
        own.wait()
        with own.reporting():
            if rank == where:
                fails()
            own.wait()


def embed(rank, where, owner, name):
    with shared_folder() as folder:
        if rank == 0:
            (folder / "pictures").mkdir()
            for i in range(4):
                (folder / "pictures" / f"{i}.png").write_bytes(picture(i, size=(32, 32)))
        dist.barrier()
        options = {"pretrained": False, "batch_size": 1, "shard_size": 1, "workers": 0}
        with ends_together(rank), failure(rank, where, owner, name):
            elip_models.embed("timm:test_vit", folder / "pictures", folder / "out", **options)


def train(rank, where, owner, name):
    with shared_folder() as folder:
        config = tiny_config(
            folder / "run", "optim.steps=2", "checkpoint_every=1", "report=[retrieval]"
        )
        stays = mock.patch("accelerate.state.PartialState.destroy_process_group")
        with ends_together(rank), stays, failure(rank, where, owner, name):
            trainer.train(config)


CASES = {
    "barrier, main": partial(barrier, where=0),
    "barrier, other": partial(barrier, where=1),
    "embed, before the shards": partial(embed, where=0, owner=embedding, name="_begin"),
    "embed, a shard": partial(embed, where=1, owner=Job, name="embed"),
    "embed, the end": partial(embed, where=0, owner=embedding.OutputFolder, name="complete"),
    "train, lock": partial(train, where=0, owner=RunFolder, name="check"),
    "train, data": partial(train, where=1, owner=trainer, name="open_training_data"),
    "train, checkpoint": partial(train, where=0, owner=Checkpoints, name="commit"),
    "train, evaluation": partial(train, where=0, owner=Evaluation, name="run"),
    "train, model folder": partial(train, where=0, owner=Evaluation, name="save"),
}
