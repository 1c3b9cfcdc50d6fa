"""The images of a collection, in a fixed order, each with a key.

    source = open_images("photographs", SourceOptions())
    source.keys[0], next(source.payloads(0, 1))

A source lists its images when it is opened, and reads their bytes later, in worker processes.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import pyarrow

from elip_models.embedding.stored import Payload
from elip_models.validation import ConfigError, did_you_mean, shortened

OnDuplicate = Literal["error", "suffix"]


@dataclass(frozen=True)
class SourceOptions:
    """How the images of a source are found and named.

    Args:
        image_column: the column of the images, or of their paths. None: by its type or name.
        key_column: the column of the keys. None: `key` if there is one.
        keep_columns: columns that are copied into the output.
        on_duplicate: what happens if several images have the same key: 'error', or 'suffix', which
            appends #2, #3 and so on.
    """

    image_column: str | None = None
    key_column: str | None = None
    keep_columns: tuple[str, ...] = ()
    on_duplicate: OnDuplicate = "error"


@dataclass(frozen=True)
class ImageSource:
    """The images of a collection.

    Attributes:
        kind: 'folder', 'tar', 'list', 'parquet' or 'datasets'.
        location: path or URL, without what may be secret.
        keys: the name of each image.
        payloads: function of the first row and the row behind the last one, which yields the
            images in between.
        columns: the columns to keep, with one row for each image.
        content: further facts that identify the list of images, such as the sizes of files.
        random_access: whether single images are read without reading the ones before them.
        list_again: function that returns the keys that the source has now; None if a source does
            not change by itself, such as a list.
    """

    kind: str
    location: str
    keys: Sequence[str]
    payloads: Callable[[int, int], Iterator[Payload]]
    columns: pyarrow.Table | None = None
    content: Iterable[Any] = field(default=(), repr=False)
    random_access: bool = True
    list_again: Callable[[], Sequence[str]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def kept(self, rows: Sequence[int]) -> dict[str, pyarrow.ChunkedArray]:
        """Return the columns to keep, of these rows."""
        if self.columns is None:
            return {}
        found = self.columns.take(pyarrow.array(rows, pyarrow.int64()))
        return dict(zip(found.column_names, found.columns, strict=True))

    def sha256(self) -> str:
        """Return a SHA-256 of the keys in their order, and of `content`."""
        digest = hashlib.sha256(self.kind.encode())
        for each in chain(self.keys, map(str, self.content)):
            digest.update(each.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def described(self) -> dict[str, Any]:
        """Return what the manifest stores."""
        named = {"location": self.location, "kind": self.kind}
        return named | {"found": len(self), "sha256": self.sha256()}

    def sample(self, count: int) -> Iterator[tuple[int, Payload]]:
        """Yield up to `count` images with their rows: evenly spaced, or the first ones."""
        count = min(count, len(self))
        if not self.random_access:
            yield from enumerate(self.payloads(0, count))
            return
        for i in range(count):
            row = i * len(self) // count
            yield row, next(self.payloads(row, row + 1))


def as_key(value: Any) -> str:
    """Return a value as a key, which is valid Unicode."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def different_keys(keys: Sequence[str], on_duplicate: OnDuplicate) -> Sequence[str]:
    """Return the keys, each different from the others; raise ConfigError for 'error'."""
    counts = Counter(keys)
    if len(counts) == len(keys):
        return keys
    if on_duplicate == "error":
        key, count = counts.most_common(1)[0]
        raise ConfigError(
            f"source: expected a different key for each image, got {shortened(key)} {count} times; "
            "on_duplicate='suffix' appends #2, #3 and so on to further ones"
        )
    found, used, numbers = [], set(counts), Counter()
    for key in keys:
        numbers[key] += 1
        if numbers[key] > 1:
            while (name := f"{key}#{numbers[key]}") in used:
                numbers[key] += 1
            used.add(name)
            found.append(name)
        else:
            found.append(key)
    return found


def check_columns(wanted: Sequence[str], known: Sequence[str], argument: str) -> None:
    """Raise ConfigError if a source does not have one of the columns."""
    for name in wanted:
        if name not in known:
            has = f"columns among {', '.join(known)}" if known else "no columns of this source"
            raise ConfigError(
                f"{argument}: expected {has}, got {shortened(name)}{did_you_mean(name, known)}"
            )
        if argument == "keep_columns" and name in ("key", "embedding", "sha256"):
            raise ConfigError(
                f"keep_columns: expected other names than those of the output, key, embedding and "
                f"sha256, got {name!r}; rename the column in the source"
            )
