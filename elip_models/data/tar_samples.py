"""Samples of a tar file: members with the same name up to the first dot.

A sample is an image with its captions in a .json ("captions" or "caption"), a .txt, or both.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from elip_models.data.sample import check_text, clean_captions
from elip_models.data.tar_members import Damage, Member, Tar, members_of

IMAGE_EXTENSIONS = ("jpeg", "jpg", "png", "webp")
TEXT_EXTENSIONS = ("json", "txt")
MAX_TEXT_BYTES = 2**20
MAX_IMAGE_BYTES = 2**28


def split_name(name: str) -> tuple[str, str]:
    """Return ("folder/a", "b.png") for "folder/a.b.png", the extension in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def image_problem(image: Member | None) -> str:
    """Return why an image cannot be read at all, or ""."""
    if image is None:
        return "no image member"
    if image.size > MAX_IMAGE_BYTES:
        return f"expected an image of at most {MAX_IMAGE_BYTES} bytes, got {image.size}"
    return ""


def read_captions(
    texts: Mapping[str, Member], read: Callable[[Member], bytes]
) -> tuple[list[str], str]:
    """Return the distinct captions of the .json, then of the .txt, and what is wrong with them."""
    captions: list[str] = []
    try:
        for extension, member in sorted(texts.items()):
            if member.size > MAX_TEXT_BYTES:
                raise ValueError(f"expected at most {MAX_TEXT_BYTES} bytes, got {member.size}")
            content: Any = read(member)
            if extension == "json":
                content = json.loads(content)
                if not isinstance(content, dict):
                    raise ValueError(f"json: expected an object, got {content!r:.100}")
                content = content.get("captions") or content.get("caption")
            else:
                content = content.decode("utf-8-sig")
            captions += clean_captions(content)
        check_text("caption", *captions)
    except (ValueError, RecursionError) as error:
        return [], f"captions not readable: {error}"
    return list(dict.fromkeys(captions)), ""


class TarSample(NamedTuple):
    """A stored sample, or a lost one: `problem` is why it cannot be read, or ""."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    problem: str


def read_samples(tar: Tar, name: str) -> Iterator[TarSample]:
    """Yield the samples of the archive called `name`, and what is lost, in one forward pass.

    As WebDataset requires, the members of a sample are adjacent; a later one is reported as lost.
    Raises ValueError if the archive is not a tar file.
    """
    ended: set[str] = set()
    current = None
    for member in members_of(tar, name):
        if isinstance(member, Damage):
            yield TarSample(f"byte {member.offset}", b"", (), member.what)
            continue
        key, extension = split_name(member.name)
        if extension not in IMAGE_EXTENSIONS + TEXT_EXTENSIONS:
            continue
        if key in ended:
            what = f"{key} ended before it; members of a sample in a stream must be adjacent"
            yield TarSample(member.name, b"", (), what)
            continue
        if current is None or current.key != key:
            if current is not None:
                ended.add(current.key)
                yield current.sample()
            current = _OpenSample(key, tar)
        if not current.add(extension, member):
            what = f"{key} already has a {extension} or an image"
            yield TarSample(member.name, b"", (), what)
    if current is not None:
        yield current.sample()


class _OpenSample:
    def __init__(self, key: str, tar: Tar) -> None:
        self.key, self._tar = key, tar
        self._image: Member | None = None
        self._texts: dict[str, Member] = {}
        self._contents: dict[Member, bytes] = {}

    def add(self, extension: str, member: Member) -> bool:
        """Read a member. Return False if the sample already has one of its kind."""
        is_image = extension in IMAGE_EXTENSIONS
        if extension in self._texts or (is_image and self._image is not None):
            return False
        if is_image:
            self._image = member
        else:
            self._texts[extension] = member
        if member.size <= (MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES):
            self._tar.seek(member.offset)
            self._contents[member] = self._tar.read(member.size)
        return True

    def sample(self) -> TarSample:
        captions, problem = read_captions(self._texts, self._contents.__getitem__)
        problem = image_problem(self._image) or problem or ("" if captions else "no caption")
        if problem:
            return TarSample(self.key, b"", (), problem)
        return TarSample(self.key, self._contents[self._image], tuple(captions), "")
