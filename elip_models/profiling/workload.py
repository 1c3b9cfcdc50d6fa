"""Workload: a model to measure, its inputs, and its step, dense or reduced.

    image model   encode_image(model, images, text_cls, strategy=..)[:, 0]
    whole model   its own forward with images and text, reduced by `reduce_`; text guidance encodes
                  the text a second time
    our models    their own forward, reduced by their own strategy; ALBEF, BLIP and METER return the
                  loss with fixed random choices; momentum towers stay dense unless they share

A training step is the forward and the backward of the output's squares, without an optimiser.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from elip_models.api import reduce_
from elip_models.engine.encode import encode_image
from elip_models.engine.install import reduction_of
from elip_models.strategies import Dense
from elip_models.strategies.strategy import Strategy
from elip_models.towers import SelfReducingModel, as_reducible, as_tower

Forward = Callable[[], Tensor]


class Workload:
    """A model with `batch_size` random images and texts, on the model's device and in its dtype.

    It is an image model that a tower supports, or a whole language-image model.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        updated = as_reducible(model).updated_by_forward()
        self.model = shared_copy(model, separate=updated) if updated else model
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
        """Return what a step runs: 'whole model' or 'image tower'."""
        return "whole model" if self.reducible.has_text else "image tower"

    def forward(self, strategy: Strategy | None) -> Forward:
        """Return the forward pass with `strategy`, or dense if it is None, in the model's mode.

        It returns the CLS output (B, D) of an image model, the features of a whole model, or the
        loss of one of our models. The texts of a whole model guide its images, if they can.
        """
        run, as_tensor, inputs = self.reduced_by(strategy), self.reducible.as_tensor, self.inputs
        reduction = reduction_of(run) if isinstance(run, nn.Module) else None
        can_guide = reduction is not None and reduction.image_text is not None
        paired = reduction.paired if can_guide else nullcontext

        def forward() -> Tensor:
            with paired():
                return as_tensor(run(**inputs))

        return forward

    def reduced_by(self, strategy: Strategy | None) -> Callable[..., object]:
        """Return a callable for the inputs, which shares all weights with the model."""
        if isinstance(self.reducible, SelfReducingModel):
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
        """Return a copy on the meta device, whose FLOPs are counted without memory or time."""
        if self.device.type == "meta":
            return self
        memo = {id(p): nn.Parameter(_empty(p), p.requires_grad) for p in self.model.parameters()}
        memo |= {id(buffer): _empty(buffer) for buffer in self.model.buffers()}
        return Workload(copy.deepcopy(self.model, memo), self.batch_size)

    def tracing(self) -> AbstractContextManager:
        """Return the context in which forwards run on the meta device."""
        return self.reducible.tracing()


def shared_copy(model: nn.Module, separate: Iterable[Tensor] = ()) -> nn.Module:
    """Copy a model's modules; parameters and buffers are shared, except those in `separate`."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for tensor in separate:
        del shared[id(tensor)]
    return copy.deepcopy(model, shared)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
