"""The feature of an image, or of a text, that a model of any library embeds it as."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.analysis.feature_measures import output_feature
from elip_models.towers import (
    SelfReducingModel,
    as_image_text,
    as_reducible,
    as_tower,
    library_of,
)
from elip_models.validation import ConfigError

TEXTS = 64  # in a batch
Function = Callable[[nn.Module, Tensor], Tensor]
"""A model and images (B, 3, H, W) -> features (B, D)."""


def image_features(model: nn.Module, new_parts: Sequence[str] = ()) -> tuple[Function, str]:
    """Return the function that embeds images, and which output of the model it returns.

    It removes the classifier of a timm model. `new_parts` have no weights.

    Raises:
        ConfigError: the model embeds no single images.
    """
    if isinstance(model, SelfReducingModel):
        if not model.ranks:
            raise ConfigError(
                f"model: expected one that embeds an image without its text, got a "
                f"{type(model).__name__}, which scores pairs"
            )
        return (lambda model, x: model.image_features(x)), "image_features, normalised"
    library = library_of(model)
    if library == "open_clip":
        if hasattr(model, "encode_image"):
            return (lambda model, x: model.encode_image(x)), "encode_image"
        return (lambda model, x: output_feature(model(x))), "output of the image tower"
    if library == "timm":
        if hasattr(model, "reset_classifier"):
            model.reset_classifier(0)
        return (lambda model, x: output_feature(model(x))), "pooled feature before the classifier"
    if library != "transformers":
        raise ConfigError(
            f"model: expected one of timm, open_clip, transformers or this library, got a "
            f"{type(model).__module__}.{type(model).__name__}"
        )
    if hasattr(model, "get_image_features"):
        name = "get_image_features"
        return (lambda model, x: model.get_image_features(pixel_values=x).pooler_output), name
    if hasattr(model, "vision_proj"):  # BLIP for retrieval
        return _blip_features, "vision_proj of the class token, normalised"
    if set(new_parts) - {"pooler"}:
        raise ConfigError(f"model: expected weights for all parts, got none for {new_parts}")
    if new_parts:
        name = "class token of last_hidden_state"
        return (lambda model, x: model(pixel_values=x).last_hidden_state[:, 0]), name
    return (lambda model, x: output_feature(model(pixel_values=x))), "pooled output"


def patch_features(model: nn.Module) -> Function:
    """Return the function that gives the feature of each patch (B, P, D), also of reduced models.

    A merged patch keeps its own values, and changes as the token does that it is part of.

    Raises:
        TypeError: the model has no such features.
    """
    if library_of(as_reducible(model).image_model) not in ("timm", "open_clip", "transformers"):
        raise TypeError(
            "model: expected one of timm, open_clip or transformers, which returns the features of "
            f"patches, got a {type(model).__name__}"
        )
    return _patch_features


def _patch_features(model: nn.Module, pixels: Tensor) -> Tensor:
    image_model = as_reducible(model).image_model
    tower = as_tower(image_model)
    if library_of(tower.model) == "transformers":
        output = image_model(pixel_values=pixels, output_hidden_states=True)
        tokens = output.get("last_hidden_state")
        if tokens is None:
            raise TypeError(
                "model: expected one that returns last_hidden_state, such as AutoModel opens, got "
                f"a {type(image_model).__name__}"
            )
    elif library_of(tower.model) == "open_clip":
        options = {"output_fmt": "NLC", "normalize_intermediates": True}
        output = tower.model.forward_intermediates(pixels, indices=1, **options)
        return output["image_intermediates"][0]
    else:
        tokens, _ = tower.model.forward_intermediates(pixels, indices=1)
    return tokens[:, tower.num_prefix_tokens :]


def text_features(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Return the features of tokenised texts, in the space of `image_features`."""
    if isinstance(model, SelfReducingModel):
        return model.text_features(**tokens)
    if hasattr(model, "encode_text"):
        return model.encode_text(**tokens)
    if hasattr(model, "get_text_features"):
        return model.get_text_features(**tokens).pooler_output
    text = model.text_encoder(**tokens).last_hidden_state
    return F.normalize(model.text_proj(text[:, 0]), dim=-1)


@torch.no_grad()
def encode_texts(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return normalised features (n, E) fp32 of texts, in the space of `image_features`.

    Raises:
        TypeError: the model embeds no texts.
    """
    image_text = model if isinstance(model, SelfReducingModel) else as_image_text(model)
    if image_text is None:
        raise TypeError(
            f"model: expected an image-text model, which embeds texts, got a "
            f"{type(model).__name__}; take a CLIP or SigLIP, or another task"
        )
    device, features = next(model.parameters()).device, []
    for first in range(0, len(texts), TEXTS):
        tokens = image_text.tokenise(tokenizer, texts[first : first + TEXTS])
        tokens = {name: ids.to(device) for name, ids in tokens.items()}
        features.append(F.normalize(text_features(model, tokens).float(), dim=-1))
    return torch.cat(features)


def _blip_features(model: nn.Module, pixels: Tensor) -> Tensor:
    tokens = model.vision_model(pixel_values=pixels).last_hidden_state
    return F.normalize(model.vision_proj(tokens[:, 0]), dim=-1)
