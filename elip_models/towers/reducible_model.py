"""What any model that can be reduced says of itself: an image model alone, a whole language-image
model of another library, or one of ours.

Measuring and drawing ask no more of a model than this.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elip_models.towers.base import Tower

Stats = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each colour, that images are normalised by."""
IMAGENET: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TEXT_TOKENS = 77  # of a random text, where the model takes more
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


class ReducibleModel:
    """A model whose image tower can be reduced.

    An adapter, or a model of ours, sets these, and defines the methods that raise
    NotImplementedError here; those that take a text, where it `has_text`.

    image_model: the model, or the one inside it, that a tower reads.
    has_text: its forward takes a text with each image, which can guide the reduction.
    reduces_itself: its forward reduces by the strategy in `reduction`, without `reduce_`; it is
        dense by that in `dense`.
    """

    image_model: nn.Module
    has_text: ClassVar[bool] = True
    reduces_itself: ClassVar[bool] = False

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """The arguments of its forward for images (B, 3, H, W): these, and what goes with them
        drawn at random, texts of full length.
        """
        raise NotImplementedError

    def as_tensor(self, output: Any) -> Tensor:
        """What its forward returns as one tensor, whose backward reaches all of the model."""
        raise NotImplementedError

    def image_stats(self) -> Stats:
        """What its images are normalised by."""
        raise NotImplementedError

    def load_tokenizer(self, name: str) -> Any:
        """The tokenizer of the model of that name, or in that folder.

        Raises:
            OSError, ValueError: there is none, or one that the model cannot read.
        """
        raise NotImplementedError

    def tokenise(self, tokenizer: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions -> the arguments of `encode_guidance`, on the CPU."""
        raise NotImplementedError

    def encode_guidance(self, **text: Tensor) -> Tensor:
        """Texts, as `tokenise` gives them -> (B, D), what guides the image tower."""
        raise NotImplementedError

    def encode_captions(self, tokenizer: Any, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, D), what guides the image tower."""
        device = next(self.image_model.parameters()).device
        text = self.tokenise(tokenizer, captions)
        return self.encode_guidance(**{name: ids.to(device) for name, ids in text.items()})

    def moved_in_training(self) -> tuple[Tensor, ...]:
        """The parameters and buffers that its forward changes in training."""
        return ()

    def tracing(self) -> AbstractContextManager:
        """Surrounds forwards on the meta device."""
        return nullcontext()


class ImageModel(ReducibleModel):
    """An image model alone, whose guidance comes from outside, as `encode_image` takes it."""

    has_text = False

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.image_model = tower.model

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        like = {"device": images.device, "dtype": images.dtype}
        return {"images": images, "text_cls": torch.randn(len(images), self.tower.width, **like)}

    def as_tensor(self, output: Tensor) -> Tensor:
        """Tokens (B, N, D) -> the first (B, D)."""
        return output[:, 0]

    def image_stats(self) -> Stats:
        """As its library says, or else ImageNet's."""
        return self.tower.image_stats() or IMAGENET


def clip_stats() -> Stats:
    """Those of CLIP, and of most language-image models since."""
    from elip_models.data import CLIP_MEAN, CLIP_STD

    return CLIP_MEAN, CLIP_STD


def random_ids(images: Tensor, length: int, vocab_size: int, end: int) -> Tensor:
    """(B, L) ids of a text for each image, on its device: `length` tokens or `TEXT_TOKENS`, the
    last one `end`.
    """
    shape = len(images), min(length, TEXT_TOKENS)
    ids = torch.randint(1, vocab_size - 1, shape, device=images.device)
    ids[:, -1] = min(end, vocab_size - 1)
    return ids


def check_tokenizer_in(folder: Path) -> None:
    """Raises FileNotFoundError where no tokenizer was saved, for libraries then make one up."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"none of {', '.join(TOKENIZER_FILES)} in {folder}")
