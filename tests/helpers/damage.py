"""Shards of data, whole, and damaged as wanted."""

import io
import tarfile

import numpy as np
from PIL import Image

BLOCK = tarfile.BLOCKSIZE

KEYS = tuple(f"k{i}" for i in range(6))


def picture(seed=0, format="PNG", size=(12, 10)):
    """An image that does not compress, in bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def shard(path, members=None, format=tarfile.USTAR_FORMAT):
    """A tar of these members, or of six samples."""
    if members is None:
        members = [(f"{key}.png", picture(i)) for i, key in enumerate(KEYS)]
        members += [(f"{key}.txt", f"caption of {key}".encode()) for key in KEYS]
        members.sort()
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def headers(path):
    """Offsets of the headers."""
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def overwrite(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def damaged(content, rng):
    """Bytes with one of six kinds of damage, by a `random.Random`."""
    at, length = rng.randrange(len(content)), rng.choice((1, 4, 512))
    junk = rng.randbytes(length)
    return rng.choice(
        (
            content[:at],
            content[:at] + junk + content[at + length :],
            content[:at] + bytes(length) + content[at + length :],
            content[:at] + content[at + length :],
            content[:at] + junk + content[at:],
            content[:at] + content[at : at + length] + content[at:],
        )
    )
