"""WebDataset tar shards, read as a map-style index: image members by offset."""

import io
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from elip_models.data.checks import check_index, existing_files
from elip_models.data.sample import Sample, SampleError, clean_captions, decode_image
from elip_models.data.tar_members import Damage, Member, read_members
from elip_models.validation import extra

if TYPE_CHECKING:
    from datasets import Dataset

_IMAGE_EXTENSIONS = ("jpeg", "jpg", "png", "webp")
_TEXT_EXTENSIONS = ("json", "txt")
_MAX_OPEN_SHARDS = 64
_MAX_TEXT_BYTES = 2**20
_MAX_IMAGE_BYTES = 2**28


class ShardSource:
    """A `Source` over uncompressed WebDataset shards.

    Members with one name up to the first dot are one sample: an image (png, jpg, jpeg or webp),
    and its captions in a .json ("captions" or "caption"), a .txt, or both. A sample's id is
    "shard:key". A sample without an image, with a damaged one, or without a caption is a
    SampleError when read, and so is everything that a damaged shard has lost: it has an index of
    its own, and is counted. Building the index reads every shard's headers and captions once. Safe
    in forked and spawned workers. Raises FileNotFoundError for a missing shard, ValueError for a
    file that is no tar.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        self._shards = existing_files("paths", paths)
        self._index = _build_index(self._shards)
        self._files = _OpenFiles()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        row = self._index[index]
        shard = self._shards[row["shard"]]
        sample_id = f"{shard.name}:{row['key']}"
        problem = row["problem"] or ("" if row["captions"] else "no caption")
        if problem:
            raise SampleError(sample_id, problem)
        try:
            data = self._files.read(shard, row["offset"], row["size"])
        except OSError as error:
            raise SampleError(sample_id, f"cannot read {shard}: {error}") from error
        image = decode_image(io.BytesIO(data), sample_id)
        return Sample(image, tuple(row["captions"]), sample_id)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions alone, no image decoded. Empty where the sample has none."""
        check_index(index, len(self))
        return tuple(self._index[index]["captions"])


class _OpenFiles:
    """Read-only handles of this process, the least recently used closed first.

    A forked child shares file positions with its parent, so a handle is used only in the process
    that opened it; a pickled copy starts with none.
    """

    def __init__(self) -> None:
        self._handles: OrderedDict[tuple[int, Path], BinaryIO] = OrderedDict()

    def __reduce__(self) -> tuple[type["_OpenFiles"], tuple[()]]:
        return _OpenFiles, ()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        key = (os.getpid(), path)
        handle = self._handles.pop(key, None) or path.open("rb")
        self._handles[key] = handle
        if len(self._handles) > _MAX_OPEN_SHARDS:
            self._handles.popitem(last=False)[1].close()
        handle.seek(offset)
        return handle.read(size)


def _build_index(shards: list[Path]) -> "Dataset":
    """Arrow table, one row a sample: shard, key, offset and size of the image, captions, problem
    (why it cannot be read, or "")."""
    with extra("ShardSource"):
        from datasets import Dataset, Features, Value

    features = Features(
        {
            "shard": Value("int32"),
            "key": Value("string"),
            "offset": Value("int64"),
            "size": Value("int64"),
            "captions": [Value("string")],
            "problem": Value("string"),
        }
    )
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for number, shard in enumerate(shards):
        for row in _rows(shard):
            columns["shard"].append(number)
            for name, value in row.items():
                columns[name].append(value)
    return Dataset.from_dict(columns, features=features)


def _rows(shard: Path) -> Iterator[dict[str, Any]]:
    """One row a key, in the order of first appearance, and one for everything that is lost."""
    images: dict[str, Member] = {}
    texts: dict[str, dict[str, Member]] = {}
    lost: list[tuple[str, str]] = []
    for member in read_members(shard):
        if isinstance(member, Damage):
            lost.append((f"byte {member.offset}", member.what))
            continue
        key, extension = _split_name(member.name)
        if extension not in _IMAGE_EXTENSIONS + _TEXT_EXTENSIONS:
            continue
        of_key = texts.setdefault(key, {})
        if extension in of_key or (extension in _IMAGE_EXTENSIONS and key in images):
            lost.append((member.name, f"{key} has another {extension} or image before it"))
        elif extension in _IMAGE_EXTENSIONS:
            images[key] = member
        else:
            of_key[extension] = member
    with shard.open("rb") as file:
        for key, members in texts.items():
            captions, problem = _read_captions(file, members)
            image = images.get(key)
            yield {
                "key": key,
                "offset": image.offset if image else 0,
                "size": image.size if image else 0,
                "captions": captions,
                "problem": _problem_of(image) or problem,
            }
    if lost:
        warnings.warn(
            f"{shard} is damaged: {'; '.join(what for _, what in lost[:3])}"
            f"{'; ..' * (len(lost) > 3)}; each counts as an unreadable sample",
            stacklevel=2,
        )
    for key, problem in lost:
        yield {"key": key, "offset": 0, "size": 0, "captions": [], "problem": problem}


def _problem_of(image: Member | None) -> str:
    """Why an image is not even read, or ""."""
    if image is None:
        return "no image member"
    if image.size > _MAX_IMAGE_BYTES:
        return f"an image of {image.size} bytes; at most {_MAX_IMAGE_BYTES} are read"
    return ""


def _split_name(name: str) -> tuple[str, str]:
    """ "folder/a.b.png" -> ("folder/a", "b.png"), the extension in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _read_captions(file: BinaryIO, members: dict[str, Member]) -> tuple[list[str], str]:
    """Captions of the json, then of the txt, each once -> (captions, what is wrong with them)."""
    captions: list[str] = []
    try:
        for extension, member in sorted(members.items()):
            if member.size > _MAX_TEXT_BYTES:
                raise ValueError(f"{member.size} bytes; at most {_MAX_TEXT_BYTES} are read")
            file.seek(member.offset)
            content: Any = file.read(member.size)
            if extension == "json":
                content = json.loads(content)
                if not isinstance(content, dict):
                    raise ValueError(f"json: expected an object, got {content!r:.100}")
                content = content.get("captions", content.get("caption"))
            else:
                content = content.decode()
            captions += clean_captions(content)
    except (ValueError, RecursionError) as error:
        return [], f"captions not readable: {error}"
    return list(dict.fromkeys(captions)), ""
