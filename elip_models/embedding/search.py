"""Search in a collection of embeddings, by a text or an image.

    result = search("embeddings", "a dog on a beach", top=10)
    result.hits[0].key, result.hits[0].similarity

    build_index("embeddings")

Similarity is the cosine of the embeddings. The search compares all embeddings, unless there is an
index of faiss: index/images.faiss, and index/index.json with its recall, its SHA-256 and that of
the manifest.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
from faiss.contrib.evaluation import knn_intersection_measure
from torch import Tensor

from elip_models.embedding.collection import Collection, open_collection, unit
from elip_models.embedding.encoder import DENSE, Encoder, open_encoder
from elip_models.embedding.output import MANIFEST, OutputFolder
from elip_models.images import IMAGE_ENDINGS, SampleError, decode_image
from elip_models.saving.files import file_sha256, read_checked, write_checked
from elip_models.strategies.serialization import strategy_of
from elip_models.user_warnings import UnguidedWarning, ignoring
from elip_models.validation import ConfigError, as_config_error

Report = Callable[[str], object]
HNSW_IMAGES = 200_000
"""Up to so many images the index is a graph (HNSW); the lists of IVF are built faster."""
CANDIDATES = 128  # of a search in the graph
PROBES = 64  # lists that a search reads
TRAINING_VECTORS = 64  # for each list
CHECKED_QUERIES, TOP = 200, 10
FOLDER, VECTORS, DESCRIPTION = "index", "images.faiss", "index.json"


@dataclass(frozen=True)
class Hit:
    """An image that is similar to a query by the cosine of the embeddings, `similarity`.

    Ranks begin with 1, and `path` is the image if it is a file of this machine.
    """

    rank: int
    similarity: float
    key: str
    path: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """The images that are the most similar to a query, a text or the path of an image.

    Attributes:
        folder: of the embeddings.
        query: the text, or the path of the image.
        images: the number of images that were searched.
        index: the kind of the index; None: all embeddings were compared.
        hits: the images, the most similar first.
    """

    folder: Path
    query: str
    images: int
    index: str | None
    hits: tuple[Hit, ...]


def search(
    folder: str | os.PathLike,
    query: str | Path,
    *,
    top: int = 10,
    model: str | Encoder | None = None,
    exact: bool = False,
    device: str | None = None,
    report: Report = lambda text: None,
) -> SearchResult:
    """Find the images of a collection that are the most similar to a text or an image.

    Args:
        folder: of the embeddings, which `embed` wrote.
        query: a text, for an image-text model; or the path of an image.
        top: the number of images to find.
        model: where the model of the embeddings is now, or an `Encoder` of it. None: where the
            manifest says.
        exact: compare all embeddings, even if there is an index.
        device: where the model runs. None: the GPU if there is one.
        report: called with lines of text, such as why an index is not used.

    Raises:
        ConfigError: the folder, the query or the model is not what is expected. The message begins
            with the argument.
    """
    collection = open_collection(folder)
    is_image = isinstance(query, Path) or os.path.isfile(query)
    query = str(query)
    if not is_image and query.lower().endswith(IMAGE_ENDINGS):
        raise ConfigError(f"query: expected a text or the path of an image, got no file {query!r}")
    if not is_image and not collection.manifest["model"]["has_text"]:
        raise ConfigError(
            f"query: expected the path of an image, since {collection.manifest['model']['name']!r} "
            f"embeds no texts, got {query!r:.200}"
        )
    if not isinstance(model, Encoder):
        encoder = query_encoder(collection, model, device)
    else:
        encoder = model
        _check_weights(encoder, collection)
    features = image_features(encoder, Path(query)) if is_image else text_features(encoder, query)
    return find(collection, features, query, top=top, exact=exact, report=report)


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
    name, strategy = model or manifest["model"]["name"], manifest["strategy"]
    preprocessing = manifest["preprocessing"]
    with as_config_error("folder"):
        reduce = DENSE if strategy is None else strategy_of(strategy)
    try:
        with ignoring(UnguidedWarning):  # `embed` gave it
            encoder = open_encoder(
                name,
                reduce=reduce,
                preprocess=preprocessing if preprocessing["kind"] == "given" else None,
                precision="fp32",
                device=device,
            )
    except ConfigError as error:
        if model is not None or not str(error).startswith("model:"):
            raise
        raise ConfigError(
            f"model: expected the model that the embeddings name, {name!r}; if it is at another "
            f"place now, pass that as model; got: {str(error).removeprefix('model: ')}"
        ) from error
    _check_weights(encoder, collection)
    if encoder.preprocessing.described != preprocessing:
        raise ConfigError(
            f"model: expected the preprocessing of the embeddings, {preprocessing}, got "
            f"{encoder.preprocessing.described}; embed the images again"
        )
    return encoder


def _check_weights(encoder: Encoder, collection: Collection) -> None:
    """Raise ConfigError if an encoder has other weights than those of the embeddings."""
    saved = collection.manifest["model"]
    if encoder.weights_sha256 != saved["weights_sha256"]:
        raise ConfigError(
            f"model: expected the weights that embedded the images, of {saved['name']!r} with "
            f"SHA-256 {saved['weights_sha256']:.16}.., got those of {encoder.name!r} with "
            f"{encoder.weights_sha256:.16}.."
        )


def text_features(encoder: Encoder, text: str) -> Tensor:
    """Return the feature (1, D) of a text; raise ConfigError if it has no words."""
    with as_config_error("query"):
        text.encode()  # raises for an unpaired surrogate
    if not text.strip():
        raise ConfigError(f"query: expected a text or the path of an image, got {text!r}")
    return encoder.encode_texts([text])


def image_features(encoder: Encoder, path: Path) -> Tensor:
    """Return the feature (1, D) of an image file; raise ConfigError if it cannot be read."""
    try:
        image = decode_image(path, str(path))
    except SampleError as error:
        raise ConfigError(f"query: expected a readable image, got {error}") from error
    with ignoring(UnguidedWarning):  # `embed` gave it
        return encoder(encoder.preprocessing.transform(image)[None])


def find(
    collection: Collection,
    features: Tensor,
    query: str,
    *,
    top: int = 10,
    exact: bool = False,
    report: Report = lambda text: None,
) -> SearchResult:
    """Return the images that are the most similar to a feature (1, D), as `search` does."""
    if top < 1:
        raise ConfigError(f"top: expected at least 1, got {top}")
    if not features.isfinite().all():
        raise ConfigError(f"query: expected a finite embedding, got NaN or infinity for {query!r}")
    if top > len(collection):
        report(f"{collection.folder} has {len(collection)} images, fewer than {top}; all are shown")
        top = len(collection)
    vectors = unit(features.cpu().numpy())
    index = None if exact else open_index(collection, report)
    searched = collection if index is None else index.vectors
    cosines, rows = searched.search(vectors, top)
    rows = rows[0][rows[0] >= 0].tolist()  # faiss fills up with -1
    hits = [
        Hit(rank, float(cosine), key, image_file(collection, key))
        for rank, (key, cosine) in enumerate(
            zip(collection.keys(rows), cosines[0], strict=False), 1
        )
    ]
    kind = None if index is None else index.kind
    return SearchResult(collection.folder, query, len(collection), kind, tuple(hits))


def image_file(collection: Collection, key: str) -> str | None:
    """Return the path of an image if it is a file of this machine, from its key; or else None."""
    source = collection.manifest["source"]
    folder = {"folder": source["location"], "list": os.path.dirname(source["location"])}
    path = os.path.join(folder.get(source["kind"], ""), key)
    return path if source["kind"] in folder and os.path.isfile(path) else None


class Index(NamedTuple):
    """An index of all embeddings of a collection.

    Attributes:
        kind: the name of the index for `faiss.index_factory`.
        vectors: that of faiss.
        recall: mean share of the ten nearest neighbours of some images that it finds.
    """

    kind: str
    vectors: faiss.Index
    recall: float


def build_index(folder: str | os.PathLike) -> Index:
    """Build an index of a collection, beside its embeddings, which `search` then uses.

    Raises:
        ConfigError: the folder is not what is expected, or another command uses it.
    """
    collection = open_collection(folder)
    output, images = collection.folder / FOLDER, len(collection)
    with as_config_error("folder"):
        str(output).encode()  # raises for a path that is not UTF-8, which faiss cannot open
    lists = 4 * math.isqrt(images)
    kind, parameter, value = "HNSW32", "efSearch", CANDIDATES
    if images > HNSW_IMAGES:
        kind, parameter, value = f"IVF{lists},Flat", "nprobe", min(PROBES, lists)
    with OutputFolder(collection.folder).locked():
        vectors = faiss.index_factory(collection.dimension, kind, faiss.METRIC_INNER_PRODUCT)
        faiss.ParameterSpace().set_index_parameter(vectors, parameter, value)
        if not vectors.is_trained:
            vectors.train(collection.take(_sampled_rows(images, TRAINING_VECTORS * lists)))
        for _, embeddings in collection.vectors():
            vectors.add(embeddings)
        queries, top = collection.take(_sampled_rows(images, CHECKED_QUERIES)), min(TOP + 1, images)
        # without the first of each row, the image itself
        rows = [searched.search(queries, top)[1][:, 1:] for searched in (collection, vectors)]
        recall = float(knn_intersection_measure(*rows)) if top > 1 else 1.0
        output.mkdir(exist_ok=True)
        (output / DESCRIPTION).unlink(missing_ok=True)  # without it the vectors are not used
        unfinished = output / f".{VECTORS}"
        try:
            faiss.write_index(vectors, str(unfinished))
            unfinished.replace(output / VECTORS)  # a search may have mapped the file
        except RuntimeError as error:  # of faiss, such as for a full disk
            raise OSError(f"{output}: {str(error).splitlines()[-1]}") from error
        finally:
            unfinished.unlink(missing_ok=True)
        description = {
            "kind": kind,
            "images": images,
            "recall_at_10": recall,
            "modified": (output / VECTORS).stat().st_mtime_ns,
            "sha256_of_vectors": file_sha256(output / VECTORS),
            "manifest_sha256": file_sha256(collection.folder / MANIFEST),
            "faiss": faiss.__version__,
        }
        write_checked(output / DESCRIPTION, description)
    return Index(kind, vectors, recall)


def _sampled_rows(total: int, count: int) -> np.ndarray:
    """Return up to `count` different rows of `total`, drawn at random and ascending."""
    rng = np.random.default_rng(0)
    return np.sort(rng.choice(total, min(count, total), replace=False))


def open_index(collection: Collection, report: Report = lambda text: None) -> Index | None:
    """Return the index of a collection, or None without one that fits.

    The file is mapped into memory, so that a search reads only what it compares: its SHA-256 is
    compared if its modification time differs. `report` is called with the reason why an index is
    not used.
    """
    folder = collection.folder / FOLDER
    if not (folder / DESCRIPTION).is_file():
        return None
    try:
        description = read_checked(folder / DESCRIPTION)
        if description["manifest_sha256"] != file_sha256(collection.folder / MANIFEST):
            raise ValueError("it is of other embeddings than the folder has now")
        is_same = description["modified"] == (folder / VECTORS).stat().st_mtime_ns
        if not is_same and description["sha256_of_vectors"] != file_sha256(folder / VECTORS):
            raise ValueError(f"{folder / VECTORS} has another SHA-256 than in {DESCRIPTION}")
        vectors = faiss.read_index(str(folder / VECTORS), faiss.IO_FLAG_MMAP_IFC)
        return Index(description["kind"], vectors, description["recall_at_10"])
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        report(
            f"the index in {folder} is not used, and all embeddings are compared: {error}; `elip "
            "index` builds it again"
        )
        return None
