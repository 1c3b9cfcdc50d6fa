"""Samples of a tar file: members with the same name up to the dot.

A sample is an image with its captions in a .json ("captions" or "caption"), a .txt, or both.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from elip_models.images import MAX_IMAGE_BYTES
from elip_models.pretraining.data.sample import clean_captions
from elip_models.pretraining.data.tar_members import (
    MORE_LOST,
    Damage,
    Member,
    Tar,
    holds_header,
    members_of,
    padded,
)
from elip_models.validation import check_text

IMAGE_EXTENSIONS = ("jpeg", "jpg", "png", "webp")
EXTENSIONS = (*IMAGE_EXTENSIONS, "json", "txt")
MAX_TEXT_BYTES = 2**20


def sample_name(name: str) -> tuple[str, str] | None:
    """Return ("folder/a", "png") for "folder/a.PNG", or None for what is not part of a sample.

    That is a file with another extension, or a hidden file, whose name begins with a dot.
    """
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.rpartition(".")
    extension = extension.lower()
    if not stem or file.startswith(".") or extension not in EXTENSIONS:
        return None
    return folder + slash + stem, extension


class SampleMembers:
    """The members of one sample, all those with the name `key`."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: list[tuple[str, Member]] = []
        self.copies = 0  # number of samples that these are: more than 1 if a kind is repeated
        self._kinds: Counter[str] = Counter()

    def add(self, extension: str, member: Member) -> bool:
        """Add a member. Return whether another one is of its kind, so that it is a further copy."""
        kind = "image" if extension in IMAGE_EXTENSIONS else extension
        self.members.append((kind, member))
        self._kinds[kind] += 1
        is_further = self._kinds[kind] > self.copies
        self.copies = max(self.copies, self._kinds[kind])
        return is_further

    def read(self, read: Callable[[Member], bytes]) -> tuple[Member | None, list[str], str]:
        """Return the image, the distinct captions, and why the sample cannot be read, or "".

        `read` returns the bytes from the offset of a member on, as many as its size.
        """
        texts = dict(self.members)
        image = texts.pop("image", None)
        problem = self._problem()
        if problem:
            return image, [], problem
        captions, problem = read_captions(texts, read)
        problem = problem or image_problem(image) or ("" if captions else "no caption")
        if problem and image is not None and image.size <= MAX_IMAGE_BYTES:
            problem = size_problem(image.name, read(image)) or problem
        return image, captions, problem

    def _problem(self) -> str:
        """Return what is wrong with the members whatever they hold, or ""."""
        if "." in self.key.rpartition("/")[2]:
            return "expected a name with one dot, at which the name of a sample ends; rename it"
        if self.copies > 1:
            return f"{self.key} has {self.copies} members of one kind; give each sample its name"
        return "; ".join(f"{each.name} {each.problem}" for _, each in self.members if each.problem)


def size_problem(name: str, content: bytes) -> str:
    """Return that the size of a member is wrong, if it holds other members, or ""."""
    if not holds_header(content):
        return ""
    return f"{name} holds other members, so its size is wrong; {MORE_LOST}"


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
    """Return the distinct captions of the .json, then of the .txt, and what is wrong with them.

    `texts` are the members by extension, `read` is that of `SampleMembers.read`.
    """
    captions: list[str] = []
    try:
        for extension, member in sorted(texts.items()):
            if member.size > MAX_TEXT_BYTES:
                raise ValueError(f"expected at most {MAX_TEXT_BYTES} bytes, got {member.size}")
            content: Any = _read_text(member, read)
            if extension == "json":
                content = json.loads(content)
                if not isinstance(content, dict):
                    raise ValueError(f"json: expected an object, got {content!r:.100}")
                content = content.get("captions") or content.get("caption")
            else:
                content = content.decode("utf-8-sig")
                if "\0" in content:
                    raise ValueError("expected text, got a zero byte")
            captions += clean_captions(content)
        check_text("caption", *captions)
    except (ValueError, RecursionError) as error:
        return [], f"captions not readable: {error}"
    return list(dict.fromkeys(captions)), ""


def _read_text(member: Member, read: Callable[[Member], bytes]) -> bytes:
    """Return a text. Raises ValueError if the bytes behind it show that its size is wrong."""
    content = read(member._replace(size=padded(member.size)))
    if problem := size_problem(member.name, content):
        raise ValueError(problem)
    text, padding = content[: member.size], content[member.size :]
    if padding.strip(b"\0"):
        raise ValueError(f"the size of {member.name} is not that of its text")
    return text


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
    ended: dict[str, SampleMembers | None] = {}  # None: the sample was yielded
    current = None
    for member in members_of(tar, name):
        if isinstance(member, Damage):
            yield TarSample(f"byte {member.offset}", b"", (), member.what)
            continue
        key, extension = sample_name(member.name) or ("", "")
        if not extension:
            continue
        if key in ended:
            late = ended[key] = ended[key] or SampleMembers(key)
            if late.add(extension, member):
                what = f"{key} ended before it; members of a sample in a stream must be adjacent"
                yield TarSample(member.name, b"", (), what)
            continue
        if current is None or current.members.key != key:
            if current is not None:
                yield from current.samples(ended)
            current = _OpenSample(key, tar)
        current.add(extension, member)
    if current is not None:
        yield from current.samples(ended)


class _OpenSample:
    def __init__(self, key: str, tar: Tar) -> None:
        self.members, self._tar = SampleMembers(key), tar
        self._contents: dict[int, bytes] = {}  # by offset

    def add(self, extension: str, member: Member) -> None:
        """Read a member, if it is the only one of its kind."""
        limit = MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
        self.members.add(extension, member)
        if member.size <= limit and self.members.copies == 1 and not member.problem:
            self._tar.seek(member.offset)
            self._contents[member.offset] = self._tar.read(padded(member.size))

    def samples(self, ended: dict[str, SampleMembers | None]) -> Iterator[TarSample]:
        """Yield the sample, or each of its copies as lost, and add it to `ended`."""
        key = self.members.key
        image, captions, problem = self.members.read(self._read)
        content = b"" if problem else self._read(image)
        problem = problem or size_problem(image.name, content)
        ended[key] = self.members if problem else None
        if problem == "no caption":
            problem += "; the members of a sample in a stream must be adjacent"
        if not problem:
            yield TarSample(key, content, tuple(captions), "")
        for _ in range(self.members.copies if problem else 0):
            yield TarSample(key, b"", (), problem)

    def _read(self, member: Member) -> bytes:
        return self._contents[member.offset][: member.size]
