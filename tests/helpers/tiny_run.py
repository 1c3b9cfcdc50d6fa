"""A training run of seconds: a reduced model of three blocks on a few built-in scenes."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from elip_models.cli import main
from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.run_config import RunConfig

SIZES = (
    "vision_width: 32, vision_heads: 2, vision_depth: 3, text_width: 32, text_heads: 2,"
    " image_size: 32, schedule: '1(100%) 1(75%) 1(50%)'"
)
BERT = "text_depth: 2, text_hidden: 64, initializer_range: 0.3"
OF_RECIPE = {
    "clip_tiny": "text_depth: 1, embed_dim: 32",
    "albef_tiny": f"{BERT}, text_layers: 1, embed_dim: 32, queue_size: 16, momentum: 0.98",
    "blip_tiny": f"{BERT}, embed_dim: 32, queue_size: 16, momentum: 0.98",
    "meter_tiny": f"{BERT}, cross_width: 32, cross_depth: 1, cross_heads: 2, cross_hidden: 64",
}
TINY = (
    "data.train=emoji_scenes:seed=0,size=48",
    "data.eval=emoji_scenes:seed=1,size=10",
    "data.vocab_size=300",
    "data.context_length=24",
    "optim.batch_size=8",
    "optim.steps=4",
    "optim.warmup_steps=1",
    "log_every=1",
    "eval_every=0",
    "checkpoint_every=100",
    "trackers=[]",
    "report=[]",
)


def tiny_arguments(folder: Path, *overrides: str, recipe: str = "clip_tiny") -> list[str]:
    """Arguments of `elip` for a tiny run in `folder`."""
    sizes = f"model.overrides={{{SIZES}, {OF_RECIPE[recipe]}}}"
    return ["train", recipe, sizes, *TINY, f"output_dir={folder}", *overrides]


def tiny_config(folder: Path, *overrides: str, recipe: str = "clip_tiny") -> RunConfig:
    """The same as a config."""
    return load_recipe(recipe, tiny_arguments(folder, *overrides, recipe=recipe)[2:])


def logged(folder: Path, *keys: str) -> list[dict]:
    """Rows of the log that hold the first of `keys`, with these keys only."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in keys} for row in rows if keys[0] in row]


@contextmanager
def own_process() -> Iterator[None]:
    """One thread, which is fastest here, and accelerate as in a process that has not used it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def status_of(program: Callable[[list[str]], NoReturn], *arguments: object) -> int:
    """Exit status of a program that is called in this process."""
    with own_process(), pytest.raises(SystemExit) as exit_:
        program([str(argument) for argument in arguments])
    return exit_.value.code or 0


def elip(*arguments: object) -> int:
    """Exit status of the command `elip`."""
    return status_of(main, *arguments)
