"""Checkpointing raises an error if a release of PyTorch renames what the replay recognises."""

import inspect
import re

import pytest
import torch
from torch.utils import checkpoint

import elip_models
from elip_models.reduction import call_context
from tests.helpers.towers import SCHEDULE, clip_vit, images

VERSION = re.escape(torch.__version__)


def backward(use_reentrant):
    model = clip_vit()
    elip_models.reduce_(model, schedule=SCHEDULE, scorer="last")
    x = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    for block in model.blocks:
        x = checkpoint.checkpoint(block, x, use_reentrant=use_reentrant)
    x.sum().backward()


class RenamedForward(checkpoint._checkpoint_hook):
    def __init__(self, frame):
        super().__init__(frame)
        self.pack_hook.__qualname__ = "ForwardHook.pack"


class RenamedRecomputation(checkpoint._recomputation_hook):
    def __init__(self, *args):
        super().__init__(*args)
        inspect.unwrap(self.pack_hook).__qualname__ = "RecomputationHook.pack"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_this_release_of_torch_is_recognised(use_reentrant):
    backward(use_reentrant)


@pytest.mark.parametrize(
    ("name", "hook"),
    [("_checkpoint_hook", RenamedForward), ("_recomputation_hook", RenamedRecomputation)],
)
def test_a_renamed_hook_raises(name, hook, monkeypatch):
    monkeypatch.setattr(checkpoint, name, hook)
    with pytest.raises(RuntimeError, match=f"got torch {VERSION}.*Hook.pack.*install"):
        backward(use_reentrant=False)


def test_a_renamed_function_raises(monkeypatch):
    function = checkpoint.CheckpointFunction.backward
    code = function.__code__.replace(co_qualname="ReentrantCheckpoint.backward")
    monkeypatch.setattr(function, "__code__", code)
    with pytest.raises(RuntimeError, match=f"got torch {VERSION}.*CheckpointFunction"):
        backward(use_reentrant=True)


def test_a_renamed_variable_raises(monkeypatch):
    read = call_context._variable
    monkeypatch.setattr(call_context, "_variable", lambda pack, name: read(pack, f"old_{name}"))
    with pytest.raises(RuntimeError, match=r"old_frame in _checkpoint_hook.*activation checkpoint"):
        backward(use_reentrant=False)


def test_a_model_that_runs_in_a_backward_hook_selects_anew():
    model = clip_vit()
    elip_models.reduce_(model, schedule=SCHEDULE, scorer="last")
    x, seen = images(), []

    def run(gradient):
        for use_reentrant in (True, False):
            tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
            for block in model.blocks:
                tokens = checkpoint.checkpoint(block, tokens, use_reentrant=use_reentrant)
            seen.append(tokens)

    y = torch.ones(1, requires_grad=True)
    y.register_hook(run)
    y.sum().backward()
    assert torch.equal(*seen)
