"""A whole language-image model of another library, whose text can guide its own image tower."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elip_models.towers.reducible_model import ReducibleModel


class ImageTextModel(ReducibleModel):
    """A language-image model whose own forward takes images and text, image tower first or last.

    One whose text cannot guide its images is reduced as its image tower alone would be.

    An adapter sets these, and defines the methods that raise NotImplementedError here.

    model, image_model: the whole model, and the one inside it that a tower reads.
    saved_config: the library's own, which it saves with the model, or None.
    """

    model: nn.Module
    saved_config: Any = None

    def __init__(self, model: nn.Module) -> None:
        raise NotImplementedError

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        """The model is one of those that the adapter knows."""
        raise NotImplementedError

    def refuses(self) -> str | None:
        """Why its text cannot guide its images, in one sentence, or None."""
        raise NotImplementedError

    def text_cls(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The guidance (B, D) in the image tower's width, from the arguments of the model's
        forward, or (1, D) for all images; None where texts and images do not `pair`.
        """
        raise NotImplementedError

    @staticmethod
    def pair(images: Tensor | None, texts: Tensor | None) -> bool:
        """Each image has a text, or all have one: not where K prompts meet B images."""
        if images is None or texts is None:
            return False
        return texts.shape[0] in (1, images.shape[0])  # of `len` an export keeps the number

    def as_tensor(self, output: Any) -> Tensor:
        """All floating-point tensors of the output, flat, one after the other."""
        values = output.values() if isinstance(output, Mapping) else output
        tensors = (v for v in values if torch.is_tensor(v) and v.is_floating_point())
        return torch.cat([tensor.flatten() for tensor in tensors])
