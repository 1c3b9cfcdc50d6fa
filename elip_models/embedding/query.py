"""A query as an embedding: a text or an image, by the model that embedded a collection."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from elip_models.embedding.collection import Collection, unit
from elip_models.embedding.encoder import Encoder, open_encoder
from elip_models.embedding.open_encoder import DENSE
from elip_models.embedding.preprocessing import Preprocessing, check_pixels
from elip_models.embedding.stored import Stored, read
from elip_models.images import IMAGE_ENDINGS, SampleError, decode_image
from elip_models.pretraining.data.sample import clean_captions
from elip_models.reduction.serialization import strategy_of
from elip_models.validation import (
    ConfigError,
    TextError,
    as_config_error,
    check,
    check_text,
    shortened,
)

GIVEN = "given"
"""Kind of a preprocessing in the manifest that was an option of `embed`."""


class Query(NamedTuple):
    """What is searched: a text, or the path of an image."""

    kind: Literal["text", "image"]
    value: str


def query_of(value: str | Path, collection: Collection) -> Query:
    """Return a query: the path of a file is an image, and any other text is a text.

    Raises:
        ConfigError: there is no such image, the text is empty, or the model embeds no texts.
    """
    if not isinstance(value, str | Path):
        raise ConfigError(f"query: expected a text or a path, got {shortened(value)}")
    text = str(value)
    if isinstance(value, Path) or os.path.isfile(text):
        return Query("image", text)
    if text.lower().endswith(IMAGE_ENDINGS):
        raise ConfigError(f"query: expected a text or the path of an image, got no file {text!r}")
    try:
        check_text("query", text)
    except TextError as error:
        raise ConfigError(str(error)) from error
    if not clean_captions(text):
        raise ConfigError(f"query: expected a text or the path of an image, got {text!r}")
    if not collection.manifest["model"]["has_text"]:
        raise ConfigError(
            f"query: expected the path of an image, since {collection.manifest['model']['name']!r} "
            f"embeds no texts, got {shortened(text)}"
        )
    return Query("text", text)


def query_encoder(
    collection: Collection, model: str | None = None, device: str | None = None
) -> Encoder:
    """Open the model that embedded a collection, with its preprocessing and reduction, in fp32.

    Args:
        collection: the embeddings.
        model: where the model is now. None: where the manifest says.
        device: where it runs. None: the GPU if there is one.

    Raises:
        ConfigError: the model is not found, or has other weights or another preprocessing.
    """
    manifest = collection.manifest
    name = model or manifest["model"]["name"]
    with as_config_error("folder"):
        strategy = manifest.get("strategy")
        reduce = DENSE if strategy is None else strategy_of(strategy)
        given = _given_preprocessing(manifest.get("preprocessing"))
    preprocess = None if given is None else "imagenet"  # replaced below
    options = {"reduce": reduce, "preprocess": preprocess, "precision": "fp32", "device": device}
    try:
        encoder = open_encoder(name, **options)
    except ConfigError as error:
        if model is not None or not str(error).startswith("model:"):
            raise
        raise ConfigError(
            f"model: expected the model that the embeddings name, {name!r}; if it is at another "
            f"place now, pass that as model; got: {str(error).removeprefix('model: ')}"
        ) from error
    check_weights(encoder, collection)
    if given is not None:
        return replace(encoder, preprocessing=given)
    now = json.loads(json.dumps(encoder.preprocessing.described))
    if now != manifest["preprocessing"]:
        changed = [key for key in now if now[key] != manifest["preprocessing"].get(key)]
        raise ConfigError(
            f"model: expected the preprocessing of the embeddings, got another "
            f"{', '.join(changed) or 'one'} of {name!r}; embed the images again"
        )
    return encoder


def check_weights(encoder: Encoder, collection: Collection) -> None:
    """Raise ConfigError if an encoder has other weights than those of the embeddings."""
    saved = collection.manifest["model"]
    if encoder.weights_sha256 != saved["weights_sha256"]:
        raise ConfigError(
            f"model: expected the weights that embedded the images, of {saved['name']!r} with "
            f"SHA-256 {saved['weights_sha256']:.16}.., got those of {encoder.name!r} with "
            f"{encoder.weights_sha256:.16}.."
        )


def _given_preprocessing(described: Any) -> Preprocessing | None:
    """Return a preprocessing that `embed` was given, or None if it was the model's own."""
    check("preprocessing", described, dict)
    if described.get("kind") != GIVEN:
        return None
    from timm.data import create_transform

    settings = {key: value for key, value in described.items() if key != "kind"}
    for name in ("input_size", "mean", "std"):
        check(f"preprocessing.{name}", settings.get(name), list)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return Preprocessing(create_transform(**settings), described)


def embed_query(query: Query, encoder: Encoder) -> np.ndarray:
    """Return the normalised embedding (1, D) of a query.

    Raises:
        ConfigError: the image cannot be read, or the embedding has NaN or infinity.
    """
    if query.kind == "text":
        found = encoder.encode_texts([query.value])
    else:
        found = encoder(_pixels(query.value, encoder)[None])
    if not found.isfinite().all():
        raise ConfigError(
            f"query: expected a finite embedding, got NaN or infinity for {shortened(query.value)}"
        )
    return unit(found.cpu().numpy())


def _pixels(path: str, encoder: Encoder) -> Tensor:
    try:
        image = decode_image(io.BytesIO(read(Stored(path))), "")
    except SampleError as error:
        raise ConfigError(
            f"query: expected a readable image, got {shortened(path)}: {error.reason}"
        ) from error
    with as_config_error("query"):
        return check_pixels(encoder.preprocessing.transform(image))
