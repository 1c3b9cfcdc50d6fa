"""A save is one event: after a kill at any moment, the folder is the old one or the new one.

    with saved_folder(folder) as new:
        ...  # write the files of the save into `new`

1. The files are written into a hidden folder beside `folder`, synchronised with the disk, and read.
2. Files of an earlier save, of any library, are in `REPLACED`. All others are the user's: they are
   linked into the new folder.
3. The two folders exchange their names, in one call of the operating system.

Libraries read several files, each in its own order and without a checksum. To move files one by one
would leave mixtures that a library loads, and a manifest would be read by this package alone.

Some file systems have no exchange. There the old folder gets another name before the new one gets
its own: after a kill between the two, `recover` undoes the first, when the folder is next loaded
or saved.

A folder without an earlier save is not replaced but filled, the configs last: no library loads it
before. It may therefore be a mount point or the current directory; with an earlier save, these
are refused before anything is changed.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from tempfile import mkdtemp

from elip_models.saving.files import sync
from elip_models.saving.meta_build import read_header
from elip_models.validation import require_extra

with require_extra("elip_models.saving"):
    from filelock import FileLock, Timeout
    from safetensors import SafetensorError

SAVING, NEW, LOCK = ".saving-", "new", "lock"
"""The hidden folder of a save, and what it contains."""
NOT_LOCKED = (Timeout, OSError, NotImplementedError)
"""Errors of a lock that is in use, removed, or of a file system without locks."""
README = "README.md"
CONFIGS = ("adapter_config.json", "config.json", "open_clip_config.json")
"""Without one of these, no library loads a folder."""
ADAPTER_FILES = (
    "adapter.json",
    "adapter_config.json",
    "adapter_model.bin",
    "adapter_model.safetensors",
)
REPLACED = (
    *CONFIGS,
    *ADAPTER_FILES,
    "elip.json",
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "pytorch_model.bin.index.json",
    README,
)
"""Names of the files that saves write: of timm, open_clip, transformers, peft and this package."""
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.*",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer*",
    "vocab.*",
)
"""Replaced by a save that has a tokenizer; a user may have saved them otherwise."""

AT_FDCWD, RENAME_EXCHANGE = -100, 2
WITHOUT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
NOT_RENAMED = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)
_renameat2 = (
    getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if sys.platform == "linux"
    else None
)


@contextmanager
def saved_folder(folder: str | os.PathLike, replaces: Sequence[str] = REPLACED) -> Iterator[Path]:
    """Yield a new folder for the files of a save, which then replaces `folder` as one event.

    An error in the block, or of the save, leaves `folder` as it was.

    Args:
        folder: created if necessary. Other files than those of an earlier save stay in it, and so
            does a README.md that was edited.
        replaces: patterns of the names that an earlier save may have.

    Raises:
        ValueError: a folder with an earlier save cannot be replaced, or a new file is damaged.
        OSError: a file cannot be written, such as on a full disk; it names `folder`.
    """
    path = Path(os.path.realpath(folder))
    recover(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, got a file", str(folder))
    earlier = _names(path, replaces)
    if earlier:
        _check_replaceable(path, earlier)
    in_place = path.is_dir() and not earlier
    parent = path if in_place else path.parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = SAVING if in_place else f".{path.name[:100]}{SAVING}"
    with _errors_name(folder), _hidden_folder(parent, prefix) as new:
        yield new
        _sign(new / README)
        if os.path.lexists(path / README) and not _is_signed(path / README):
            (new / README).unlink(missing_ok=True)
        _check(new)
        if in_place:
            if other := _names(path, replaces):
                raise FileExistsError(
                    errno.EEXIST, f"another save has written {', '.join(other)}", str(folder)
                )
            _fill(path, new)
            return
        patterns = [*replaces, *(TOKENIZER_FILES if _names(new, TOKENIZER_FILES) else ())]
        _link_others(path, new, patterns)
        try:
            old = _exchange_or_rename(new, path)
        except OSError as error:
            if error.errno not in NOT_RENAMED:
                raise
            raise _refusal(path, earlier, f"not renamed by the system: {error.strerror}") from error
        if old is not None:
            _link_others(old, path, patterns)  # written by others since
            shutil.rmtree(old, ignore_errors=True)


def unfinished(path: Path) -> Path:
    """Return the hidden name under which processes write the folder `path`, before `publish`."""
    return path.with_name(f".{path.name}")


def publish(path: Path) -> None:
    """Give the folder `unfinished(path)` its name, when its files are on the disk.

    It replaces a folder with this name.
    """
    _sync_all(unfinished(path))
    old = _exchange_or_rename(unfinished(path), path)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def restore_replaced(path: Path) -> None:
    """Restore the folder `path` if `publish` was killed, and remove what it left half-written."""
    recover(path)
    for leftover in (unfinished(path), _replaced(path)):
        shutil.rmtree(leftover, ignore_errors=True)


def recover(path: str | os.PathLike) -> bool:
    """Undo a replacement that was killed between its renames; return whether there was one."""
    with suppress(ValueError):  # no folder can have this name
        path = Path(os.path.realpath(path))
        if not os.path.lexists(path) and os.path.isdir(_replaced(path)):
            os.replace(_replaced(path), path)
            return True
    return False


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _names(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Return the names in a folder of files of a save."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if _is_of_a_save(folder / name, patterns))


def _is_of_a_save(file: Path, patterns: Sequence[str]) -> bool:
    """Whether a file has a name of a save; a README.md that was edited is the user's."""
    matches = any(fnmatchcase(file.name, pattern) for pattern in patterns)
    return matches and (file.name != README or _is_signed(file))


def _check_replaceable(path: Path, earlier: list[str]) -> None:
    current = None
    with suppress(FileNotFoundError):  # it was removed
        current = Path.cwd()
    problems = {
        "a mount point": os.path.ismount(path),
        "the current directory, or contains it": current is not None
        and current.is_relative_to(path),
        "in a folder that cannot be written": not os.access(path.parent, os.W_OK | os.X_OK),
    }
    problem = next((problem for problem, is_so in problems.items() if is_so), None)
    if problem is not None:
        raise _refusal(path, earlier, problem)


def _refusal(path: Path, earlier: list[str], problem: str) -> ValueError:
    return ValueError(
        "folder: expected a folder that can be replaced as a whole, since it has an earlier save, "
        f"got {path}, which is {problem}; pass a new folder inside it, or remove "
        f"{', '.join(earlier)} first"
    )


@contextmanager
def _hidden_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder inside a hidden one, and remove those that killed saves left.

    A lock of the operating system, which ends with its process, tells them from those in use.
    """
    for left in parent.glob(f"{escape(prefix)}*"):
        if (left / LOCK).exists():
            with suppress(*NOT_LOCKED), FileLock(left / LOCK, timeout=0):
                _remove(left)
    hidden, lock = _locked_folder(parent, prefix)
    try:
        (hidden / NEW).mkdir()
        yield hidden / NEW
    finally:
        lock.release()
        _remove(hidden)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, FileLock]:
    """Create a hidden folder and lock it; another one if a save removes it before it is locked."""
    while True:
        hidden = Path(mkdtemp(dir=parent, prefix=prefix))
        lock = FileLock(hidden / LOCK, timeout=0)
        with suppress(Timeout, FileNotFoundError):
            with suppress(NotImplementedError):  # a file system without locks
                lock.acquire()
            if hidden.is_dir():
                return hidden, lock
            lock.release()


def _remove(hidden: Path) -> None:
    shutil.rmtree(hidden / NEW, ignore_errors=True)  # before the lock
    shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def _errors_name(folder: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None) is not None:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", None), reason, str(folder)) from error


def _check(new: Path) -> None:
    """Raise ValueError if a file is incomplete, and return when all are on the disk."""
    for file in new.rglob("*.safetensors"):
        read_header(file)
    for file in new.rglob("*.json"):
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file.name}: expected JSON, got {error}; save again") from error
    _sync_all(new)


def _sync_all(folder: Path) -> None:
    for entry in (*folder.rglob("*"), folder):
        sync(entry)


def _fill(folder: Path, new: Path) -> None:
    """Move files into a folder without an earlier save, the configs last."""
    files = sorted(file for file in new.rglob("*") if file.is_file())
    for are_configs in (False, True):
        for file in files:
            if (file.name in CONFIGS) == are_configs:
                target = folder / file.relative_to(new)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        sync(folder)


def _link_others(old: Path, new: Path, patterns: Sequence[str]) -> None:
    """Link what is in the folder `old` into `new`, unless it is of a save or `new` has it."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        into = new / Path(folder).relative_to(old)
        return {
            name
            for name in names
            if (into == new and (_is_of_a_save(old / name, patterns) or name.startswith(SAVING)))
            or (os.path.lexists(into / name) and not _is_real_folder(os.path.join(folder, name)))
        }

    if old.is_dir():
        options = {"symlinks": True, "dirs_exist_ok": True}
        shutil.copytree(old, new, copy_function=_link, ignore=left_out, **options)
        sync(new)


def _is_real_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:  # removed since the folder was listed
        return
    except OSError:  # the file system has no links, or the file is another user's
        shutil.copy2(source, target)


def _exchange_or_rename(new: Path, path: Path) -> Path | None:
    """Give the folder `new` the name `path`; return where the one is that had it, if any."""
    old = None
    if not path.exists():
        os.replace(new, path)
    elif _exchange(new, path):
        old = new
    else:
        old = _replaced(path)
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            os.replace(old, path)
            raise
    sync(path.parent)
    return old


def _exchange(new: Path, path: Path) -> bool:
    """Exchange the names of two folders at once; False if the file system cannot."""
    names = AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(path)
    if _renameat2 is None:
        return False
    if _renameat2(*names, RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number not in WITHOUT_EXCHANGE:
        raise OSError(number, os.strerror(number), str(path))
    return False


def _sign(card: Path) -> None:
    """Add a checksum to a model card, which tells later whether it was edited."""
    if card.is_file() and not _is_signed(card):
        text = card.read_text(encoding="utf-8").rstrip() + "\n\n"
        card.write_text(text + _signature(text), encoding="utf-8")


def _is_signed(card: Path) -> bool:
    if not card.is_file():
        return False
    text = card.read_bytes().decode(errors="replace")
    start = text.rfind("<!--")
    return text[max(start, 0) :] == _signature(text[: max(start, 0)])


def _signature(text: str) -> str:
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    return f"<!-- Written by elip-kernels, replaced by the next save unless edited: {digest} -->\n"
