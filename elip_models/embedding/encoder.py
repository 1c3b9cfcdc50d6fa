"""A model as a function from images, or texts, to embeddings."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from elip_models.analysis.model_features import Function, image_features, text_features
from elip_models.api import reduce_, strategies_in, unreduce_
from elip_models.embedding.preprocessing import Preprocessing, preprocessing_of
from elip_models.profiling.measure import device_named
from elip_models.profiling.workload import shared_copy
from elip_models.saving.dense_models import OPEN_CLIP_CONFIG, NewPartsWarning
from elip_models.saving.files import tensors_sha256
from elip_models.saving.open_model import model_folder, open_model, split_spec, split_weights
from elip_models.strategies.dense import Dense
from elip_models.strategies.flops import check_share
from elip_models.strategies.serialization import settings_of
from elip_models.strategies.strategy import Strategy
from elip_models.towers import ImageTextModel, SelfReducingModel, as_image_text
from elip_models.validation import ConfigError, as_config_error

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DENSE = "none"
"""The reduction that leaves a model dense."""


@dataclass(frozen=True)
class Encoder:
    """A model that embeds images, and texts if it is an image-text model.

    Attributes:
        name: the text that named the model.
        model: the model, on its device and in its precision, in eval mode.
        features: function of the model and images (B, 3, H, W) that returns features (B, D).
        feature: which output of the model the embedding is, in words.
        preprocessing: function from an image to pixels, and its settings.
        precision: 'fp32', 'bf16' or 'fp16'.
        dimension: D.
        weights_sha256: of the model's tensors.
        compiled: run the model by torch.compile.
    """

    name: str
    model: nn.Module
    features: Function
    feature: str
    preprocessing: Preprocessing
    precision: str = "fp32"
    dimension: int = 0
    weights_sha256: str = ""
    compiled: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def strategy(self) -> Strategy | None:
        """The strategy that reduces the model, or None if it is dense."""
        strategies = strategies_in(self.model)
        return next((kept for kept in strategies if not isinstance(kept, Dense)), None)

    @property
    def has_text(self) -> bool:
        """Whether the model embeds texts."""
        return self._image_text is not None

    @property
    def _image_text(self) -> ImageTextModel | SelfReducingModel | None:
        model = self.model
        return model if isinstance(model, SelfReducingModel) else as_image_text(model)

    @cached_property
    def _tokenizer(self) -> Any:
        return self._image_text.load_tokenizer(tokenizer_name(self.name))

    @cached_property
    def _run(self) -> Function:
        return torch.compile(self.features) if self.compiled else self.features

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Return features (B, D) in fp32, on the device, of pixels (B, 3, H, W)."""
        moved = pixels.to(self.device, DTYPES[self.precision], non_blocking=True)
        return self._run(self.model, moved).float()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return features (n, D) of texts in fp32, in the space of the images.

        Raises:
            ConfigError: the model embeds no texts, or has no tokenizer.
        """
        if not self.has_text:
            raise ConfigError(
                f"texts: expected an image-text model, got {self.name!r}, which embeds images only"
            )
        with as_config_error("texts"):
            tokens = self._image_text.tokenise(self._tokenizer, texts)
        return text_features(self.model, {k: v.to(self.device) for k, v in tokens.items()}).float()

    def reduced(self, reduce: str | Strategy | None, keep: float | None = None) -> "Encoder":
        """Return an encoder with the same weights and another reduction; 'none' for dense."""
        model = set_reduction(shared_copy(self.model), reduce, keep)
        return replace(self, model=model, compiled=False)

    def described(self) -> dict[str, Any]:
        """Return model, preprocessing, strategy and precision, as the manifest stores them."""
        return {
            "model": {
                "name": self.name,
                "class": type(self.model).__name__,
                "weights_sha256": self.weights_sha256,
                "feature": self.feature,
                "dimension": self.dimension,
                "has_text": self.has_text,
            },
            "preprocessing": self.preprocessing.described,
            "strategy": None if self.strategy is None else settings_of(self.strategy),
            "precision": self.precision,
            "compiled": self.compiled,
        }


def open_encoder(
    name: str,
    *,
    reduce: str | Strategy | None = None,
    keep: float | None = None,
    preprocess: str | Path | dict[str, Any] | None = None,
    precision: Precision = "auto",
    device: str | torch.device | None = None,
    pretrained: bool = True,
    compile: bool = False,
) -> Encoder:
    """Open the model that embeds; the arguments are those of `embed`.

    Raises:
        ConfigError: the model cannot be opened, embeds no single images, or an option is wrong.
    """
    model, new_parts = open_embedding_model(name, pretrained)
    features, feature = image_features(model, new_parts)
    preprocessing = preprocessing_of(model, preprocess)
    weights = tensors_sha256(model.state_dict())
    with as_config_error("device", inner="device"):
        device = device_named(device)
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision not in DTYPES:
        raise ConfigError(f"precision: expected auto, {', '.join(DTYPES)}, got {precision!r}")
    model = set_reduction(model, reduce, keep).to(device, DTYPES[precision]).eval()
    model.requires_grad_(False)
    encoder = Encoder(name, model, features, feature, preprocessing, precision)
    dimension = _dimension(encoder)
    return replace(encoder, dimension=dimension, weights_sha256=weights, compiled=compile)


def open_embedding_model(
    spec: str, pretrained: bool, *, with_head: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model that a text names, and its parts that have no weights.

    The arguments are those of `open_model`.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
        ImportError: a library is missing; the message names the extra.
    """
    with warnings.catch_warnings(record=True) as caught, as_config_error("model", inner="spec"):
        warnings.simplefilter("always")
        model = open_model(spec, pretrained=pretrained, with_head=with_head)
    new_parts: tuple[str, ...] = ()
    for warning in caught:
        if isinstance(warning.message, NewPartsWarning):
            new_parts = warning.message.parts
        else:
            warnings.warn(warning.message, stacklevel=2)
    return model.eval(), new_parts


def tokenizer_name(spec: str) -> str:
    """Return what a model's `load_tokenizer` takes: the name in its library, or a folder."""
    if os.path.isdir(spec):
        folder = model_folder(spec)
        is_open_clip = (folder / OPEN_CLIP_CONFIG).is_file()
        return f"local-dir:{folder}" if is_open_clip else str(folder)
    library, name = split_spec(spec)
    return split_weights(name)[0] if library == "open_clip" else name


def set_reduction(model: nn.Module, reduce: str | Strategy | None, keep: float | None) -> nn.Module:
    """Reduce a model in place, or make it dense.

    Args:
        model: image model or image-text model.
        reduce: a strategy, a line of text that describes one, or a file of `calibrate`; 'none' for
            dense. None and no `keep`: the reduction with which the model was saved, if any.
        keep: mean share of tokens over the layers.

    Raises:
        ConfigError: the model cannot be reduced like this.
    """
    with as_config_error("keep", inner="keep"):
        keep = check_share(keep)
    if reduce is None and keep is None:
        return model
    if reduce == DENSE:
        if keep is not None:
            raise ConfigError(f"keep: expected none with reduce='none', got {keep}")
        return unreduce_(model)
    with as_config_error("reduce", inner="strategy"):
        return reduce_(model, reduce, keep=keep)


def _dimension(encoder: Encoder) -> int:
    """Return the width of the embedding of an image, also if it is no square."""
    transform = encoder.preprocessing.transform
    try:
        images = [transform(Image.new("RGB", size)) for size in ((256, 256), (320, 240))]
        _, dimension = encoder(torch.stack(images)).shape
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model: expected one that embeds an image alone as a vector, with a preprocessing to "
            f"one size, got a {type(encoder.model).__name__}: {error!s:.300}"
        ) from error
    return dimension
