"""Recipes trained on two processes, sharded by FSDP2 and whole under DistributedDataParallel."""

import json
import os
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from elip_models.pretraining.models.registry import load_model
from elip_models.pretraining.training.optim import skip_nonfinite_step_
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import Trainer, train
from tests.helpers.tiny_run import own_process, tiny_config
from tests.helpers.weights import assert_equal_weights

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}
SHARD = "optim.shard=true"
OF_A_START = {"images_per_second", "trainable", "trainable_share"}
OF_PROCESSES = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}


def run(folder, *options, resume=False, recipe="clip_tiny"):
    """A run of both processes, whose group stays for the next."""
    rank = str(dist.get_rank())
    environment = {**OF_PROCESSES, "RANK": rank, "LOCAL_RANK": rank}
    stays = mock.patch("accelerate.state.PartialState.destroy_process_group")
    with mock.patch.dict(os.environ, environment), stays, own_process():
        config = tiny_config(folder, "optim.steps=3", *options, recipe=recipe)
        result = train(config, resume=resume)
    dist.barrier()
    return result


@contextmanager
def shared_folder():
    """One folder for both processes."""
    with TemporaryDirectory() as own:
        names = [own]
        dist.broadcast_object_list(names)
        yield Path(names[0])
        dist.barrier()


def numbers_of(folder):
    """The saved weights, and every number of the log but what a start alone says."""
    rows = {
        f"row {number}, {name}": value
        for number, row in enumerate(RunFolder(folder).rows())
        for name, value in row.items()
        if name not in OF_A_START
    }
    return rows | load_file(folder / "model" / "model.safetensors")


def assert_equal_runs(one, other, **tolerance):
    got, expected = numbers_of(one), numbers_of(other)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def as_replicated(rank, options=(), recipe="clip_tiny", **tolerance):
    """The same losses, norms and weights, and a single process loads them."""
    with shared_folder() as folder:
        whole, sharded = folder / "whole", folder / "sharded"
        run(whole, *options, recipe=recipe)
        result = run(sharded, *options, SHARD, recipe=recipe)
        assert_equal_runs(sharded, whole, **(ROUNDING | tolerance))
        assert result.is_main_process == (rank == 0)
        is_whole = not any(isinstance(weight, DTensor) for weight in result.model.parameters())
        assert is_whole == (rank == 0)
        if rank == 0:
            assert_equal_weights(load_model(sharded / "model"), result.model)


def resumed(rank, options=(), recipe="clip_tiny"):
    """A run that stopped after four steps of six goes on to the same bits."""
    options = ("optim.steps=6", "checkpoint_every=4", SHARD, *options)
    with shared_folder() as folder:
        whole, stopped = folder / "whole", folder / "stopped"
        run(whole, *options, recipe=recipe)
        if rank == 0:
            shutil.copytree(whole, stopped)
            shutil.rmtree(RunFolder(stopped).checkpoints.latest())
            shutil.rmtree(stopped / "model")
            checkpoint = RunFolder(stopped).checkpoints.latest()
            assert checkpoint.name == "step_00000004"
            written = set(json.loads((checkpoint / "run.json").read_text())["sha256"])
            shards = {f"shards/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")}
            assert written == shards | {f"random_states_{rank}.pkl" for rank in range(2)}
        dist.barrier()
        run(stopped, *options, resume=True, recipe=recipe)
        assert_equal_runs(stopped, whole, **EXACT)


def nonfinite(rank):
    """A loss that is NaN on one process: both skip the step, as replicated ones do."""
    forward = Trainer._forward

    def spoiling(trainer, tensors):
        output = forward(trainer, tensors)
        if trainer.step == 1 and rank == 1:
            output.loss = output.loss * torch.nan
        return output

    with mock.patch.object(Trainer, "_forward", spoiling):
        as_replicated(rank)


def fused(rank):
    """AdamW as on a GPU: fused, and told to skip a step that is not finite."""
    adamw = torch.optim.AdamW

    def step_as_told(optimizer, grad_norm):
        assert all(group["fused"] for group in optimizer.param_groups)
        skip_nonfinite_step_(optimizer, grad_norm)
        optimizer.step()

    def made(*groups, **options):
        return adamw(*groups, **(options | {"fused": True}))

    with (
        mock.patch("torch.optim.AdamW", made),
        mock.patch("elip_models.pretraining.training.sharded.step_", step_as_told),
    ):
        nonfinite(rank)


ALL = (
    "optim.gather=global",
    "optim.grad_accumulation=2",
    "optim.batch_slices=2",
    "optim.grad_checkpointing=true",
    "optim.max_grad_norm=0.1",
    "optim.lr_scale={'text.*': 3, 'logit_scale': 2}",
    "eval_every=2",
    "report=[retrieval]",
)
LORA = ("peft.kind=lora",)
METER = ("model.overrides.dropout=0.1", "optim.gather=global", "optim.grad_accumulation=2")

CASES = {
    "clip, all options": partial(as_replicated, options=ALL),
    "meter": partial(as_replicated, options=METER, recipe="meter_tiny"),
    "meter, lora": partial(as_replicated, options=LORA, recipe="meter_tiny"),
    "clip resumed": partial(resumed, options=ALL),
    "clip, fused": fused,
}
