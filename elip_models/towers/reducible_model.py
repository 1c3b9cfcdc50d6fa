"""The common form of models that can be reduced: image models, and language-image models.

Profiling and visualization read a model through this interface alone.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elip_models.images import IMAGENET_STATS, Stats
from elip_models.towers.base import Tower
from elip_models.towers.tower_parts import ModuleReference

TEXT_TOKENS = 77  # the longest random text
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


class ReducibleModel:
    """A model whose image tower can be reduced.

    Subclasses set these attributes, and define the methods that raise NotImplementedError; those
    that take a text only if `has_text`.

    image_model: the image model that a tower reads: the model itself, or a part of it.
    has_text: the forward takes a text with each image, which can guide the reduction.
    """

    image_model: nn.Module
    has_text: ClassVar[bool] = True

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the forward's arguments: images (B, 3, H, W), and random texts of full length."""
        raise NotImplementedError

    def as_tensor(self, output: Any) -> Tensor:
        """Return the forward's output as one tensor, whose backward reaches the whole model."""
        raise NotImplementedError

    def image_stats(self) -> Stats:
        """Return the mean and standard deviation that images are normalised by."""
        raise NotImplementedError

    def load_tokenizer(self, name: str) -> Any:
        """Return the tokenizer of the model of that name, or in that folder.

        Raises:
            OSError, ValueError: there is no tokenizer, or the model cannot read it.
        """
        raise NotImplementedError

    def tokenise(self, tokenizer: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the arguments of `encode_guidance` for B captions, on the CPU."""
        raise NotImplementedError

    def encode_guidance(self, **text: Tensor) -> Tensor:
        """Return the guidance (B, D) of texts from `tokenise`."""
        raise NotImplementedError

    def encode_captions(self, tokenizer: Any, captions: Sequence[str]) -> Tensor:
        """Return the guidance (B, D) of B captions."""
        device = next(self.image_model.parameters()).device
        text = self.tokenise(tokenizer, captions)
        return self.encode_guidance(**{name: ids.to(device) for name, ids in text.items()})

    def updated_by_forward(self) -> tuple[Tensor, ...]:
        """Return the parameters and buffers that the forward changes in training."""
        return ()

    def tracing(self) -> AbstractContextManager:
        """Return the context for forwards on the meta device."""
        return nullcontext()


class SelfReducingModel(ReducibleModel):
    """A model whose forward reduces by its own strategy, which its config stores.

    tower: adapter of the image model.
    reduction: the strategy of the forward pass, `dense` if it reduces nothing.
    ranks: `image_features` and `text_features` can be compared.
    """

    tower: Tower
    reduction: Any
    dense: Any
    ranks: ClassVar[bool] = True

    @property
    def is_reduced(self) -> bool:
        """Whether the forward reduces."""
        return self.reduction != self.dense

    def set_reduction(self, strategy: Any | None) -> None:
        """Replace the strategy of the forward and of the config; None makes the model dense."""
        raise NotImplementedError

    def elip_strategy(self) -> Any:
        """Return the model's own ELIP strategy, or ELIP with the schedule of its paper."""
        raise NotImplementedError

    def image_features(self, images: Tensor) -> Tensor:
        """Return normalised features (B, E) of images (B, 3, H, W) without text, if `ranks`."""
        raise NotImplementedError

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return normalised features (B, E) of input_ids, attention_mask (B, L), if `ranks`."""
        raise NotImplementedError


class ImageModel(ReducibleModel):
    """An image model alone, whose guidance is an argument, as in `encode_image`."""

    has_text = False

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.image_model = tower.model

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the forward's arguments: `images` (B, 3, H, W), and random `text_cls` (B, D)."""
        like = {"device": images.device, "dtype": images.dtype}
        return {"images": images, "text_cls": torch.randn(len(images), self.tower.width, **like)}

    def as_tensor(self, output: Tensor) -> Tensor:
        """Return token 0 (B, D) of tokens (B, N, D)."""
        return output[:, 0]

    def image_stats(self) -> Stats:
        """Return the statistics that the library stores; otherwise warn, and return ImageNet's."""
        return self.tower.image_stats() or default_stats(
            self.image_model, "ImageNet", IMAGENET_STATS
        )


class ImageTextModel(ReducibleModel):
    """A language-image model of another library, whose text can guide its own image tower.

    Its forward takes images and text, and runs the image tower first or last. If `refuses` returns
    a reason, the model is reduced as its image tower alone. An adapter sets these attributes, and
    defines the methods that raise NotImplementedError.

    model, image_model: the whole model, and the part of it that a tower reads.
    saved_config: the configuration that the library saves with the model, or None.
    reads_patches: whether other parts of the model read the patches of the tower's last block.
    """

    model = ModuleReference()
    image_model = ModuleReference()
    saved_config: Any = None
    reads_patches: bool = False

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        """Return whether this adapter reads the model."""
        raise NotImplementedError

    def refuses(self) -> str | None:
        """Return why the text cannot guide the image tower, in one sentence, or None if it can."""
        return None

    def images_and_text(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the images, and the arguments of `encode_guidance`, in those of the forward."""
        raise NotImplementedError

    def pairs(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether a forward with these arguments is about text i and image i together."""
        return False

    def text_cls(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Return the guidance by the text of each image, from the arguments of the forward.

        Its shape is (B, D) with the image tower's width D, or (1, D) for all images; None if images
        or texts are missing.

        Raises:
            ValueError: another number of texts than images.
        """
        images, text = self.images_and_text(*args, **kwargs)
        texts = next(iter(text.values()))
        if images is None or texts is None:
            return None
        if texts.shape[0] not in (1, images.shape[0]):  # torch.export would specialise `len`
            raise ValueError(
                "texts: expected one for each image, or one for all, in a call whose texts guide "
                f"the images, got {texts.shape[0]} texts and {images.shape[0]} images; pass pairs, "
                "or call the model outside of guidance(model, paired=True)"
            )
        return self.encode_guidance(**text)

    def as_tensor(self, output: Any) -> Tensor:
        """Return all floating-point tensors of the output, flattened and concatenated."""
        values = output.values() if isinstance(output, Mapping) else output
        tensors = (v for v in values if torch.is_tensor(v) and v.is_floating_point())
        return torch.cat([tensor.flatten() for tensor in tensors])


def default_stats(model: nn.Module, name: str, stats: Stats) -> Stats:
    """Return `stats`, called `name`; warn once for each class of model."""
    _warn_default_stats(type(model).__name__, name, stats)
    return stats


@cache
def _warn_default_stats(model: str, name: str, stats: Stats) -> None:
    warnings.warn(
        f"{model} stores no mean and standard deviation of its images, so {name}'s are used: mean "
        f"{tuple(stats[0])}, std {tuple(stats[1])}. If it was trained with others, load it from a "
        "folder with its preprocessing (preprocessor_config.json), or by its name in the library",
        stacklevel=4,
    )


def random_ids(images: Tensor, length: int, vocab_size: int, end: int) -> Tensor:
    """Return random token ids (B, L) on the device of `images` (B, 3, H, W).

    L is at most `length` and at most `TEXT_TOKENS`; the last id is `end`.
    """
    shape = len(images), min(length, TEXT_TOKENS)
    ids = torch.randint(1, vocab_size - 1, shape, device=images.device)
    ids[:, -1] = min(end, vocab_size - 1)
    return ids


def check_tokenizer_in(folder: Path) -> None:
    """Raise FileNotFoundError if the folder has no tokenizer; libraries would make up one."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"none of {', '.join(TOKENIZER_FILES)} in {folder}")
