"""A model to be measured: its inputs, and its step, dense or reduced.

    image model   encode_image(model, images, text_cls, strategy=..)[:, 0]
    whole model   its own forward of images and text, reduced by `reduce_`, which encodes the text a
                  second time where text guides
    ours          their own forward, reduced by their own setting, which need not; ALBEF, BLIP and
                  METER give the loss of a fixed draw; momentum towers stay dense unless they share

A training step is the forward and the backward of the output's squares, without an optimiser.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from elip_models.models.base import PretrainedModel
from elip_models.models.clip import CLIP
from elip_models.models.cross_modal import CrossModalModel
from elip_models.models.drawn import fixed_draw
from elip_models.models.momentum_model import MomentumModel
from elip_models.reduction.encode import encode_image
from elip_models.reduction.patch import reduce_
from elip_models.reduction.strategies.elip import Elip
from elip_models.reduction.strategy import Strategy, tower_of
from elip_models.towers import Tower, as_image_text

TEXT_TOKENS = 77  # a text, where the model takes more
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
        if isinstance(model, MomentumModel):  # a step of training moves these
            moved = (*model.encoders_m.parameters(), *model.queue.buffers())
            model = shared_copy(model, apart=moved)
        self.model = model
        self.batch_size = batch_size
        self.tower = tower_in(model)
        self.is_whole = isinstance(model, PretrainedModel) or as_image_text(model) is not None
        weight = next(model.parameters())
        self.device = weight.device
        random = {"device": weight.device, "dtype": weight.dtype}
        self.images = torch.randn(batch_size, 3, *self.tower.image_size, **random)
        if self.is_whole:
            self.text = _random_ids(model, batch_size, weight.device)
        else:
            self.text = torch.randn(batch_size, self.tower.width, **random)

    @property
    def step(self) -> str:
        """What a step runs, in words."""
        return "whole model" if self.is_whole else "image tower"

    def forward(self, strategy: Strategy | None) -> Forward:
        """The forward pass under `strategy`, or dense, in the model's present mode.

        Returns:
            A call that gives the CLS output (B, D) of an image model, the features of a whole one
            end to end, or the loss of one of ours.

        Raises:
            TypeError, ValueError: a strategy that does not fit the model.
        """
        if not self.is_whole:
            plan = strategy or Elip(f"{self.tower.depth}(100%)")
            plan.check(self.tower)
            return lambda: encode_image(self.model, self.images, self.text, strategy=plan)[:, 0]
        model = shared_copy(self.model)
        inputs = _inputs(model, self.images, self.text)
        if isinstance(model, PretrainedModel):
            model.reduction = strategy or model.dense
            model.reduction.check(model.tower)
            return lambda: model(**inputs).loss
        if strategy is not None:
            reduce_(model, strategy=strategy)
        return lambda: _features(model(**inputs))

    def train_step(self, forward: Forward) -> None:
        """Forward and backward, without an optimiser."""
        forward().square().sum().backward()
        self.model.zero_grad(set_to_none=True)

    def on_meta(self) -> "Workload":
        """The same without memory: what runs there takes no time, and counts the same FLOPs."""
        if self.device.type == "meta":
            return self
        memo = {id(p): nn.Parameter(_empty(p), p.requires_grad) for p in self.model.parameters()}
        memo |= {id(buffer): _empty(buffer) for buffer in self.model.buffers()}
        return Workload(copy.deepcopy(self.model, memo), self.batch_size)

    def traced(self) -> AbstractContextManager:
        """Around forwards on meta: whole models of transformers read their masks' values, except
        under fake tensors, which are slower."""
        if self.is_whole and type(self.model).__module__.startswith("transformers."):
            return FakeTensorMode(allow_non_fake_inputs=True)
        return nullcontext()


def shared_copy(model: nn.Module, apart: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of its modules with the very same parameters and buffers, but copies of `apart`."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for tensor in apart:
        del shared[id(tensor)]
    return copy.deepcopy(model, shared)


def tower_in(model: nn.Module) -> Tower:
    """The image tower of any model that a `Workload` takes."""
    return model.tower if isinstance(model, PretrainedModel) else tower_of(model)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _random_ids(model: nn.Module, batch_size: int, device: torch.device) -> Tensor:
    """(B, L) token ids, full length, the end of the text last."""
    if isinstance(model, PretrainedModel):
        config = model.config
        length, vocabulary = config.context_length, config.vocab_size
        end = config.eos_token_id if isinstance(model, CLIP) else config.sep_token_id
    elif hasattr(model, "context_length"):  # open_clip
        length, vocabulary = model.context_length, model.vocab_size
        end = vocabulary - 1
    else:
        text = model.config.text_config
        length, vocabulary, end = text.max_position_embeddings, text.vocab_size, text.eos_token_id
    ids = torch.randint(1, vocabulary - 1, (batch_size, min(length, TEXT_TOKENS)), device=device)
    ids[:, -1] = min(end, vocabulary - 1)
    return ids


def _inputs(model: nn.Module, images: Tensor, text: Tensor) -> dict[str, Any]:
    """The arguments of a whole model's forward."""
    if isinstance(model, CrossModalModel):
        more = {"attention_mask": torch.ones_like(text), "drawn": fixed_draw(model, images, text)}
        return {"images": images, "input_ids": text, **more}
    if isinstance(model, PretrainedModel):
        return {"images": images, "input_ids": text}
    if hasattr(model, "context_length"):
        return {"image": images, "text": text}
    return {"pixel_values": images, "input_ids": text}


def _features(output: Any) -> Tensor:
    """What a whole model returns as one tensor, so that backward reaches all of it."""
    values = output.values() if isinstance(output, Mapping) else output
    tensors = [v for v in values if torch.is_tensor(v) and v.is_floating_point()]
    return torch.cat([tensor.flatten() for tensor in tensors])
