"""An index of faiss beside the embeddings, with which a search compares only some of them.

    build_index("embeddings")     # elip index embeddings

    index/images.faiss            normalised embeddings; their numbers are the rows of the shards
    index/index.json              kind, measured recall, and the SHA-256 of the manifest

Up to HNSW_IMAGES images it is a graph (HNSW), above that an inverted file (IVF), whose lists are
built faster. Both hold all embeddings in fp32. An index of another manifest is not used.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from elip_models.embedding.collection import Collection, open_collection
from elip_models.embedding.neighbours import nearest
from elip_models.embedding.output import OutputFolder, writing
from elip_models.saving.files import read_object, write_json
from elip_models.validation import ConfigError, require_extra

HNSW_IMAGES = 200_000
LINKS = 32  # of a vector in the graph
CANDIDATES = 128  # of a search in the graph
PROBES = 64  # lists that a search reads
TRAINING_VECTORS = 64  # for each list
FORMAT, FOLDER, VECTORS, DESCRIPTION = 1, "index", "images.faiss", "index.json"
CHECKED_QUERIES, NEIGHBOURS = 200, 10
Report = Callable[[str], object]


@dataclass(frozen=True)
class Index:
    """An index of all embeddings of a collection.

    Attributes:
        kind: 'HNSW' or 'IVF'.
        index: that of faiss.
        recall: mean share of the ten nearest neighbours of some images that it finds.
    """

    kind: str
    index: Any
    recall: float

    def nearest(self, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and cosines (Q, K); a row of -1 stands for an image that was not found."""
        cosines, rows = self.index.search(np.ascontiguousarray(queries), top)
        return rows, cosines


def build_index(
    folder: str | os.PathLike, *, progress: Callable[[int, int], object] = lambda done, total: None
) -> Index:
    """Build an index of a collection, beside its embeddings, which `search` then uses.

    Args:
        folder: of the embeddings, which `embed` wrote.
        progress: called with the images so far, and all.

    Raises:
        ConfigError: the folder is not what is expected, or the index cannot be written.
        ImportError: faiss is missing; the message names the extra.
    """
    with require_extra("elip index"):
        import faiss

    collection = open_collection(folder)
    with OutputFolder(collection.folder).locked():
        kind, index = _new_index(collection)
        for first, vectors in collection.chunks():
            index.add(vectors)
            progress(first + len(vectors), len(collection))
        found = Index(kind, index, 1.0)
        found = Index(kind, index, _recall(collection, found))
        _write(collection, found, faiss)
    return found


def _new_index(collection: Collection) -> tuple[str, Any]:
    """Return the kind of an index for a collection of this size, and the index without vectors."""
    import faiss

    width, images = collection.dimension, len(collection)
    if images <= HNSW_IMAGES:
        index = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = CANDIDATES
        return "HNSW", index
    lists = 4 * math.isqrt(images)
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(PROBES, lists)
    index.train(collection.take(sampled_rows(images, TRAINING_VECTORS * lists, seed=0)))
    return "IVF", index


def sampled_rows(total: int, count: int, seed: int) -> np.ndarray:
    """Return up to `count` different rows of `total`, drawn at random and ascending."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(total, min(count, total), replace=False))


def _recall(collection: Collection, index: Index) -> float:
    """Return the mean share of the nearest neighbours of some images that an index finds."""
    top = min(NEIGHBOURS, len(collection) - 1)
    if not top:
        return 1.0
    own = sampled_rows(len(collection), CHECKED_QUERIES, seed=0)
    queries = collection.take(own)
    exact, _ = nearest(collection, queries, top, without=own)
    rows, _ = index.nearest(queries, top + 1)
    shares = [
        len({*wanted} & {*[each for each in found if each != row][:top]}) / top
        for wanted, found, row in zip(exact.tolist(), rows.tolist(), own.tolist(), strict=True)
    ]
    return float(np.mean(shares))


def _write(collection: Collection, index: Index, faiss: Any) -> None:
    """Write the vectors, and then the description, without which they are not used."""
    folder = collection.folder / FOLDER
    unfinished = folder / f".{VECTORS}"
    with writing(collection.folder):
        folder.mkdir(exist_ok=True)
        (folder / DESCRIPTION).unlink(missing_ok=True)
    try:
        faiss.write_index(index.index, str(unfinished))
        os.replace(unfinished, folder / VECTORS)
    except RuntimeError as error:  # of faiss, such as for a full disk
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"folder: the index cannot be written in {folder}: {reason}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    described = {
        "format": FORMAT,
        "kind": index.kind,
        "images": len(collection),
        "recall_at_10": index.recall,
        "bytes": (folder / VECTORS).stat().st_size,
        "manifest_sha256": collection.manifest_sha256,
        "faiss": faiss.__version__,
    }
    with writing(collection.folder):
        write_json(folder / DESCRIPTION, described)


def open_index(collection: Collection, report: Report = lambda text: None) -> Index | None:
    """Return the index of a collection, or None without one that fits.

    `report` is called with the reason why an index is not used.
    """
    folder = collection.folder / FOLDER
    if not (folder / DESCRIPTION).is_file():
        return None
    problem = _problem(folder, collection)
    if problem is None:
        import faiss

        try:
            described = read_object(folder / DESCRIPTION)
            index = faiss.read_index(str(folder / VECTORS), faiss.IO_FLAG_MMAP_IFC)
            if (index.d, index.ntotal) == (collection.dimension, len(collection)):
                return Index(described["kind"], index, described["recall_at_10"])
            problem = "has other vectors than the embeddings"
        except RuntimeError as error:  # of faiss
            problem = f"is damaged ({str(error).strip().splitlines()[-1]:.200})"
    report(
        f"the index in {folder} {problem}; all embeddings are compared instead. `elip index` "
        "builds it again"
    )
    return None


def _problem(folder: Path, collection: Collection) -> str | None:
    """Return why an index cannot be used, or None."""
    try:
        described = read_object(folder / DESCRIPTION)
    except (OSError, ValueError) as error:
        return f"is damaged ({error!s:.200})"
    if described.get("manifest_sha256") != collection.manifest_sha256:
        return "is of other embeddings than the folder has now"
    if described.get("format") != FORMAT or not {"kind", "recall_at_10"} <= described.keys():
        return f"has not format {FORMAT}"
    path = folder / VECTORS
    if not path.is_file() or path.stat().st_size != described.get("bytes"):
        return f"is damaged ({VECTORS} has not the size that {DESCRIPTION} names)"
    if find_spec("faiss") is None:
        return "needs faiss, pip install 'elip-kernels[search]'"
    return None
