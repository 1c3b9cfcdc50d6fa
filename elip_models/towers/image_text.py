"""A language-image model whose text can guide its own image tower."""

from typing import Any

from torch import Tensor, nn


class ImageTextModel:
    """A language-image model whose own forward takes images and text, image tower first or last.

    An adapter sets these, and defines the methods that raise NotImplementedError here.

    model, image_model: the whole model, and the one inside it that a tower reads.
    unsupported_methods: methods of the model that would return nonsense on a reduced one.
    """

    model: nn.Module
    image_model: nn.Module
    unsupported_methods: tuple[str, ...] = ()

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
        forward; None where they lack images or text."""
        raise NotImplementedError
