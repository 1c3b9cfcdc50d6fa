"""Folders of embeddings, as `elip embed` writes them, of given vectors."""

import numpy as np
import pyarrow

from elip_models.embedding.output import OutputFolder, as_arrow, shard_file


def write_collection(folder, vectors, *, keys=None, sha256=None, shard_size=10_000):
    """Write the vectors (n, D) of images with the keys 0.png, 1.png and so on."""
    keys = [f"{i}.png" for i in range(len(vectors))] if keys is None else list(keys)
    sha256 = keys if sha256 is None else sha256
    output = OutputFolder(folder)
    model = {"name": "timm:none", "weights_sha256": "0", "has_text": False}
    source = {"kind": "tar", "location": "none.tar"}
    files = []
    with output.locked():
        model["dimension"] = vectors.shape[1]
        output.begin({"model": model, "strategy": None, "source": source})
        for first in range(0, max(1, len(vectors)), shard_size):
            rows = slice(first, first + shard_size)
            columns = {
                "key": pyarrow.array(keys[rows], pyarrow.string()),
                "embedding": as_arrow(np.asarray(vectors[rows])),
                "sha256": pyarrow.array(sha256[rows], pyarrow.string()),
            }
            files.append(shard_file(len(files)))
            output.write(files[-1], columns)
        output.complete(files, keys)
    return folder
