"""A model to be measured: its inputs, and its step, dense or reduced.

    image model   encode_image(model, images, text_cls, strategy=..)[:, 0]
    whole model   its own forward of images and text, reduced by `reduce_`, which encodes the text a
                  second time where text guides
    ours          their own forward, reduced by their own strategy, which need not; ALBEF, BLIP and
                  METER give the loss of a fixed draw; momentum towers stay dense unless they share

A training step is the forward and the backward of the output's squares, without an optimiser.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from elip_models.reduction.encode import encode_image
from elip_models.reduction.patch import reduce_
from elip_models.reduction.strategies import Dense
from elip_models.reduction.strategy import Strategy
from elip_models.towers import as_reducible, as_tower

Forward = Callable[[], Tensor]


class Workload:
    """A model with random inputs, on its device and in its dtype.

    Args:
        model: an image model that a tower reads, or a whole language-image model.
        batch_size: of the images, and of the texts.

    Raises:
        TypeError: a model that cannot be reduced.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        moved = as_reducible(model).moved_in_training()
        self.model = shared_copy(model, apart=moved) if moved else model
        self.batch_size = batch_size
        self.reducible = as_reducible(self.model)
        self.tower = as_tower(self.reducible.image_model)
        weight = next(model.parameters())
        self.device = weight.device
        size = batch_size, 3, *self.tower.image_size
        images = torch.randn(size, device=weight.device, dtype=weight.dtype)
        self.inputs = self.reducible.random_inputs(images)

    @property
    def step(self) -> str:
        """What a step runs: 'whole model' or 'image tower'."""
        return "whole model" if self.reducible.has_text else "image tower"

    def forward(self, strategy: Strategy | None) -> Forward:
        """Prepare the forward pass under `strategy`, or dense where it is None, in the model's
        mode.

        Returns:
            A call that gives the CLS output (B, D) of an image model, the features of a whole one
            end to end, or the loss of one of ours.

        Raises:
            TypeError, ValueError: a strategy that does not fit the model.
        """
        run, as_tensor, inputs = self.reduced_by(strategy), self.reducible.as_tensor, self.inputs
        return lambda: as_tensor(run(**inputs))

    def reduced_by(self, strategy: Strategy | None) -> Callable[..., object]:
        """Prepare what is called with the inputs; it shares all weights with the model."""
        if self.reducible.reduces_itself:
            model = shared_copy(self.model)
            model.reduction = (strategy or model.dense).fitted(model.tower)
            return model
        if not self.reducible.has_text:
            strategy = (strategy or Dense()).fitted(self.tower)
            return partial(encode_image, self.model, strategy=strategy)
        model = shared_copy(self.model)
        if strategy is not None:
            reduce_(model, strategy=strategy)
        return model

    def train_step(self, forward: Forward) -> None:
        """Run forward and backward, without an optimiser."""
        forward().square().sum().backward()
        self.model.zero_grad(set_to_none=True)

    def on_meta(self) -> "Workload":
        """Copy the workload to the meta device, where it needs no memory and no time and counts the
        same FLOPs.
        """
        if self.device.type == "meta":
            return self
        memo = {id(p): nn.Parameter(_empty(p), p.requires_grad) for p in self.model.parameters()}
        memo |= {id(buffer): _empty(buffer) for buffer in self.model.buffers()}
        return Workload(copy.deepcopy(self.model, memo), self.batch_size)

    def tracing(self) -> AbstractContextManager:
        """The context that forwards on the meta device run in."""
        return self.reducible.tracing()


def shared_copy(model: nn.Module, apart: Iterable[Tensor] = ()) -> nn.Module:
    """Copy the modules of a model, which share its parameters and buffers, except for `apart`."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for tensor in apart:
        del shared[id(tensor)]
    return copy.deepcopy(model, shared)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
