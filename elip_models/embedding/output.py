"""The folder of embeddings, which stays consistent if the process is killed at any moment.

    manifest.json                 what is embedded and how; at the end counts and checksums
    images/shard-000000.parquet   a whole shard, or no file
    texts/shard-000000.parquet
    skipped.parquet               written at the end, from the lists in the shards
    check.json                    figures of the check before the run

Every file is written under another name and renamed. A shard has the list of its skipped images in
its metadata, so that one rename completes both. docs/embed.md describes the format.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
from filelock import FileLock, Timeout
from pyarrow import parquet

from elip_models.saving.files import read_object, write_file, write_json
from elip_models.validation import ConfigError, shortened

FORMAT = 1
MANIFEST, SKIPPED, CHECK, LOCK = "manifest.json", "skipped.parquet", "check.json", ".lock"
IMAGES, TEXTS = "images", "texts"
SHARDS = "*/shard-*.parquet"
UNFINISHED = (
    *(f".{name}.*" for name in (MANIFEST, SKIPPED, CHECK)),
    *(f"{part}/.shard-*.parquet.*" for part in (IMAGES, TEXTS)),
)
"""What `write_file` leaves in a folder if the process is killed."""
METADATA = b"elip"
RESULT = ("complete", "counts", "files")
"""Fields of the manifest that a run sets at its end; the others are its settings."""
Skipped = tuple[int, str, bool]
"""Row of an image without an embedding, the reason, and whether its embedding was not finite."""


class OutputFolder:
    """The files of one collection of embeddings. One process writes."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and lock it; raise ConfigError if another run uses it."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output: expected a folder, got the file {self.path}")
        self._refuse_other_files()
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK)
        with writing(self.path):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ConfigError(
                    f"output: expected a folder that no other run uses, got {self.path}; wait "
                    "until the other run ends, or choose another folder"
                ) from None
        try:
            yield
        finally:
            lock.release()

    def _refuse_other_files(self) -> None:
        names = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        others = [name for name in names if not name.startswith(".")]
        if others and MANIFEST not in names:
            raise ConfigError(
                f"output: expected a new or empty folder, or one with a {MANIFEST} of this "
                f"command, got {self.path} with {', '.join(others[:3])}{' ..' * (len(others) > 3)}"
            )

    def begin(self, settings: dict[str, Any]) -> None:
        """Store the settings of a run, or compare them with those of the run to continue.

        A run that wrote no shard, such as one that the check stopped, does not bind the next one.

        Raises:
            ConfigError: the folder has embeddings with other settings.
        """
        for pattern in UNFINISHED:
            for file in self.path.glob(pattern):
                file.unlink()
        settings = json.loads(json.dumps({"format": FORMAT} | settings))
        manifest = self.path / MANIFEST
        if manifest.is_file():
            saved = self.manifest()
            if any(self.path.glob(SHARDS)):
                self._check_same({k: v for k, v in saved.items() if k not in RESULT}, settings)
                return
        with writing(self.path):
            (self.path / CHECK).unlink(missing_ok=True)
            write_json(manifest, _with_result(settings))

    def reopen(self) -> None:
        """Store that the embeddings are not complete, since shards are missing."""
        saved = self.manifest()
        if saved["complete"]:
            with writing(self.path):
                write_json(self.path / MANIFEST, _with_result(saved))

    def manifest(self) -> dict[str, Any]:
        """Return the manifest; raise ConfigError if it is not what a run wrote."""
        try:
            saved = read_object(self.path / MANIFEST)
        except (OSError, ValueError) as error:
            raise ConfigError(f"output: {error}") from error
        if saved.get("format") != FORMAT or "complete" not in saved:
            raise ConfigError(
                f"output: expected a {MANIFEST} of format {FORMAT}, got format "
                f"{shortened(saved.get('format'))} in {self.path}"
            )
        return saved

    def _check_same(self, saved: dict[str, Any], settings: dict[str, Any]) -> None:
        there, now = _flat(saved), _flat(settings)
        keys = [
            key
            for key in {**there, **now}
            if there.get(key) != now.get(key) and key != "source.location"
        ]
        if not keys:
            return
        listed = "; ".join(
            f"{key}: {shortened(there.get(key))} there, {shortened(now.get(key))} now"
            for key in keys[:3]
        )
        more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ConfigError(
            f"output: expected the settings of the embeddings in {self.path}, got others: {listed}"
            f"{more}; choose another folder, or remove this one"
        )

    def shard(self, number: int, part: str = IMAGES) -> Path:
        """Return the file of a shard."""
        return self.path / part / f"shard-{number:06d}.parquet"

    def write_shard(
        self,
        number: int,
        columns: Mapping[str, Any],
        skipped: Sequence[Skipped] = (),
        part: str = IMAGES,
    ) -> None:
        """Write a shard with these columns, completely or not at all."""
        table = pyarrow.table(dict(columns))
        metadata = {METADATA: json.dumps({"skipped": [*skipped]}).encode()}
        self._write_table(self.shard(number, part), table.replace_schema_metadata(metadata))

    def _write_table(self, path: Path, table: pyarrow.Table) -> None:
        memory = pyarrow.BufferOutputStream()
        parquet.write_table(table, memory, compression="zstd", use_dictionary=False)
        with writing(self.path):
            path.parent.mkdir(exist_ok=True)
            write_file(path, memory.getvalue())

    def skipped_in(self, number: int, rows: int) -> list[Skipped] | None:
        """Return the skipped images of a shard of `rows` images; None if it is not whole."""
        path = self.shard(number)
        if not path.is_file():
            return None
        try:
            found = parquet.read_metadata(path)
            content = json.loads(found.metadata[METADATA])
            skipped = [(int(row), str(why), bool(bad)) for row, why, bad in content["skipped"]]
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError):
            return None
        return skipped if found.num_rows + len(skipped) == rows else None

    def complete(self, keys: Sequence[str], skipped: Sequence[Skipped]) -> dict[str, int]:
        """Write the list of skipped images and the final manifest; return the counts.

        Raises:
            RuntimeError: embedded and skipped images do not add up to those that were found.
        """
        skipped = sorted(skipped)
        table = {
            "row": pyarrow.array([row for row, _, _ in skipped], pyarrow.int64()),
            "key": pyarrow.array([keys[row] for row, _, _ in skipped], pyarrow.string()),
            "reason": pyarrow.array([reason for _, reason, _ in skipped], pyarrow.string()),
        }
        self._write_table(self.path / SKIPPED, pyarrow.table(table))
        files = [self._described(path) for path in sorted(self.path.glob(SHARDS))]
        embedded = sum(each["rows"] for each in files if each["file"].startswith(f"{IMAGES}/"))
        counts = {"found": len(keys), "embedded": embedded, "skipped": len(skipped)}
        counts["non_finite"] = sum(is_non_finite for *_, is_non_finite in skipped)
        if embedded + len(skipped) != len(keys):
            raise RuntimeError(
                f"{self.path}: expected {len(keys)} images, embedded or skipped, got {embedded} "
                f"and {len(skipped)}"
            )
        files.append(self._described(self.path / SKIPPED))
        settings = {key: value for key, value in self.manifest().items() if key not in RESULT}
        result = {"complete": True, "counts": counts, "files": files}
        with writing(self.path):
            write_json(self.path / MANIFEST, settings | result)
        return counts

    def _described(self, path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "file": path.relative_to(self.path).as_posix(),
            "rows": parquet.read_metadata(path).num_rows,
            "bytes": path.stat().st_size,
            "sha256": digest,
        }


def _with_result(settings: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in settings.items() if key not in RESULT}
    return settings | {"complete": False, "counts": None, "files": None}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by their dotted keys."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= _flat(each, f"{name}.{key}" if name else key)
    return found


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system, such as a full disk, into one that names the remedy."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"{what}; the files that were written are whole: after the cause is removed, run the "
            "same command again",
            str(path),
        ) from error
