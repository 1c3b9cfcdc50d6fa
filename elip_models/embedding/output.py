"""The folder of embeddings, which stays consistent if the process is killed at any moment.

    manifest.json                 what is embedded and how; at the end counts and checksums
    images/shard-000000.parquet   a whole shard, or no file
    checksums/                    of each Parquet file, written after it, as `sha256sum` has it
    skipped.parquet               written at the end, from the lists in the shards
    check.json                    figures of the check before the run

Every file is written under another name and renamed. A shard counts only with its checksum, so that
one that was damaged or swapped is written again. The shard has the list of its skipped images in
its metadata. docs/collections.md describes the format.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet
from pydantic import TypeAdapter

from elip_models.saving.files import (
    file_sha256,
    read_checked,
    read_object,
    write_checked,
    write_file,
)
from elip_models.saving.locked_folder import locked_folder
from elip_models.validation import ConfigError, shortened

FORMAT = 3
MANIFEST, SKIPPED, CHECK = "manifest.json", "skipped.parquet", "check.json"
IMAGES, CHECKSUMS = "images", "checksums"
METADATA = b"elip"
RESULT = ("complete", "counts", "files")
"""Fields of the manifest that a run sets at its end; the others are its settings."""
UNFINISHED = re.compile(
    r"\.((manifest|check)\.json|(images-)?(shard-\d+|skipped)\.parquet(\.sha256)?)\.\d+\.\d+"
)
"""What `write_file` leaves behind if the process is killed: a name, a process and a thread."""
Skipped = tuple[int, str, bool]
"""Row of an image without an embedding, the reason, and whether its embedding was not finite."""
SKIPPED_ROWS = TypeAdapter(list[Skipped])


class OutputFolder:
    """The files of one collection of embeddings."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def locked(self) -> AbstractContextManager[None]:
        """Create the folder and lock it, as `locked_folder` does."""
        return locked_folder(self.path, "output", marker=MANIFEST, leftovers=UNFINISHED.pattern)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Store the settings of a run, or compare them with those of the run to continue.

        A run that wrote no shard, such as one that the check stopped, does not bind the next one.

        Raises:
            ConfigError: the folder has embeddings with other settings, or a manifest of another
                program.
        """
        saved = self.manifest() if (self.path / MANIFEST).is_file() else None
        for part in ("", IMAGES, CHECKSUMS):
            for file in (self.path / part).glob(".*"):
                if UNFINISHED.fullmatch(file.name):
                    file.unlink()
        settings = json.loads(json.dumps({"format": FORMAT} | settings))
        if saved is not None and any(self.path.glob("*/shard-*.parquet")):
            self._check_same(saved, settings)
            return
        (self.path / CHECK).unlink(missing_ok=True)
        write_checked(self.path / MANIFEST, settings | dict.fromkeys(RESULT) | {"complete": False})

    def reopen(self) -> None:
        """Store that the embeddings are not complete."""
        unfinished = dict.fromkeys(RESULT) | {"complete": False}
        write_checked(self.path / MANIFEST, self.manifest() | unfinished)

    def manifest(self) -> dict[str, Any]:
        """Return the manifest; raise ConfigError if it is not what a run wrote."""
        try:
            return read_manifest(self.path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"output: {error}; choose another folder, or remove this one"
            ) from error

    def _check_same(self, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        there = {key: value for key, value in saved.items() if key not in RESULT}
        there, now = _by_dotted_key(there), _by_dotted_key(settings)
        different = [
            f"{key}: {shortened(there.get(key))} there, {shortened(now.get(key))} now"
            for key in {**there, **now}
            if there.get(key) != now.get(key) and key != "source.location"
        ]
        if different:
            more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
            raise ConfigError(
                f"output: expected the settings of the embeddings in {self.path}, got others: "
                f"{'; '.join(different[:3])}{more}; choose another folder, or remove this one"
            )

    def write(self, file: str, columns: Mapping[str, Any], skipped: Sequence[Skipped] = ()) -> None:
        """Write a Parquet file and its checksum."""
        metadata = {METADATA: json.dumps(sorted(skipped)).encode()}
        table = pyarrow.table(dict(columns)).replace_schema_metadata(metadata)
        content = pyarrow.BufferOutputStream()
        parquet.write_table(table, content, compression="zstd", use_dictionary=False)
        digest = hashlib.sha256(buffer := content.getvalue()).hexdigest()
        line = f"{digest}  {file}\n".encode()
        for path, written in ((self.path / file, buffer), (self._checksum_of(file), line)):
            try:
                path.parent.mkdir(exist_ok=True)
                write_file(path, written)
            except OSError as error:  # such as a full disk
                reason = (
                    f"{error.strerror}; the files that were written are whole: after the cause is "
                    "removed, run the same command again"
                )
                raise OSError(error.errno, reason, str(path)) from error

    def _checksum_of(self, file: str) -> Path:
        return self.path / CHECKSUMS / f"{file.replace('/', '-')}.sha256"

    def is_whole(self, file: str) -> bool:
        """Return whether the file of a shard is as it was written."""
        try:
            line = self._checksum_of(file).read_text()
            if line != f"{file_sha256(self.path / file)}  {file}\n":
                return False
            self.skipped_in(file)
        except (OSError, ValueError, KeyError, TypeError):  # of pyarrow too
            return False
        return True

    def skipped_in(self, file: str) -> list[Skipped]:
        """Return the skipped images of a whole shard."""
        return SKIPPED_ROWS.validate_json(self._footer(file).metadata[METADATA])

    def _footer(self, file: str) -> parquet.FileMetaData:
        with (self.path / file).open("rb") as opened:  # pyarrow takes no path that is not UTF-8
            return parquet.read_metadata(opened)

    def complete(self, shards: Sequence[str], keys: Sequence[str]) -> dict[str, int]:
        """Write the list of skipped images and the final manifest; return the counts.

        Args:
            shards: the files of all shards of images.
            keys: of all images.

        Raises:
            ConfigError: a shard is missing, or has other images than the source.
        """
        for file in shards:
            if not self._checksum_of(file).is_file():
                raise ConfigError(
                    f"output: expected {file} in {self.path}; all processes have to see the same "
                    "folder; run the same command again"
                )
        files = [self._described(file) for file in shards]
        embedded = sum(described["rows"] for described in files)
        skipped = sorted(row for file in shards for row in self.skipped_in(file))
        counts = {"found": len(keys), "embedded": embedded, "skipped": len(skipped)}
        are_rows = not skipped or (skipped[0][0] >= 0 and skipped[-1][0] < len(keys))
        if embedded + len(skipped) != len(keys) or not are_rows:
            raise ConfigError(
                f"output: expected files of the {len(keys)} images of the source in {self.path}, "
                f"got {counts}; remove {self.path / IMAGES} and run the same command again"
            )
        rows, reasons, bad = zip(*skipped, strict=True) if skipped else ((), (), ())
        table = {
            "row": pyarrow.array(rows, pyarrow.int64()),
            "key": pyarrow.array([keys[row] for row in rows], pyarrow.string()),
            "reason": pyarrow.array(reasons, pyarrow.string()),
        }
        self.write(SKIPPED, table)
        counts["non_finite"] = sum(bad)
        files.append(self._described(SKIPPED))
        result = {"complete": True, "counts": counts, "files": files}
        write_checked(self.path / MANIFEST, self.manifest() | result)
        return counts

    def _described(self, file: str) -> dict[str, Any]:
        path = self.path / file
        return {
            "file": file,
            "rows": self._footer(file).num_rows,
            "bytes": path.stat().st_size,
            "sha256": self._checksum_of(file).read_text().partition(" ")[0],
        }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder; raise OSError or ValueError if it is damaged or edited."""
    version = read_object(folder / MANIFEST).get("format")
    if version != FORMAT:
        raise ValueError(
            f"{folder / MANIFEST}: format: expected {FORMAT}, got {shortened(version)}, of another "
            "version of this library"
        )
    return read_checked(folder / MANIFEST)


def shard_file(number: int) -> str:
    """Return the name of the file of a shard of images."""
    return f"{IMAGES}/shard-{number:06d}.parquet"


def as_arrow(features: np.ndarray) -> pyarrow.FixedSizeListArray:
    """Return features (n, D) as an array of fixed-size lists."""
    flat = np.ascontiguousarray(features).reshape(-1)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), features.shape[1])


def _by_dotted_key(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a dict and of the dicts in it by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        inner = value if isinstance(value, dict) and value else {"": value}
        values |= {f"{key}.{name}".rstrip("."): leaf for name, leaf in inner.items()}
    return values
