"""A run of two processes that wait 6 seconds for one another in training, evaluation taking 12."""

import datetime
import sys
import time
from functools import partial
from pathlib import Path

import torch.distributed as dist

from elip_models.pretraining.training.evaluation import Evaluation
from elip_models.pretraining.training.trainer import train
from tests.helpers.tiny_run import tiny_config

run = Evaluation.run


def slowly(self, *given):
    time.sleep(12)
    return run(self, *given)


if __name__ == "__main__":
    Evaluation.run = slowly
    dist.init_process_group = partial(
        dist.init_process_group, timeout=datetime.timedelta(seconds=6)
    )
    train(tiny_config(Path(sys.argv[1]), "optim.steps=2", "report=[retrieval]"))
