"""Files of weights: safetensors, or what torch.save writes, as one file or as shards.

Only tensors are read; no code in a file is run, and a small file takes little memory.
"""

import mmap
import os
import pickle
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elip_models.saving.files import read_object, read_tensors
from elip_models.validation import mismatch_error

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LOAD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error),
)
"""Errors of torch.load for content other than tensors, and for files of another format."""
MOST_SHARED = 4
"""Tensors of a file may together be so many times its size, by sharing memory, as tied ones do."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file or folder, without DataParallel's and compile's prefixes."""
    stored = _read_stored(path)
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in stored.items()}
    if len(weights) < len(stored):
        raise ValueError(f"source: expected each tensor once, with or without _orig_mod, in {path}")
    while weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): weight for name, weight in weights.items()}
    return weights


def _read_stored(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(
                f"source: expected one of {', '.join(WEIGHT_FILES)} in a folder, got none in {path}"
            )
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"source: expected a file or a folder, got none at {path}")
    if path.suffix == ".json":
        shards = read_object(path).get("weight_map")
        if mismatch_error(shards, dict[str, str]):
            raise ValueError(
                f"source: expected weights, or the index of their shards, got {path}; pass the "
                "folder of a config"
            )
        files = [path.parent / shard for shard in sorted(set(shards.values()))]
        for file in files:
            if not os.path.isfile(file):  # False also for a name that no file can have
                raise FileNotFoundError(
                    f"source: expected {file!s:.300}, which {path} names, got no file"
                )
        pieces = [_read_file(file) for file in files]
        return {name: weight for piece in pieces for name, weight in piece.items()}
    return _read_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return read_tensors(path, finite=False)
        except ValueError as error:
            raise ValueError(f"source: {error}") from error
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        others = ""
        with suppress(*LOAD_ERRORS):  # a damaged file
            others = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        got, remedy = f"{others:.300}, which could run code", ""
        if not others:
            got = f"a damaged file or other content ({type(error).__name__})"
            remedy = "copy or download it again, or "
        raise ValueError(
            f"source: expected only tensors, numbers and texts in {path}, got {got}; {remedy}if "
            "you trust it, save only its state dict, torch.save({'model': state_dict}, ..)"
        ) from error
    weights = _state_dict_in(content, path)
    taken, size = sum(map(_bytes_of, weights.values())), path.stat().st_size
    if taken > MOST_SHARED * size:
        largest = max(weights, key=lambda name: _bytes_of(weights[name]))
        raise ValueError(
            f"source: expected tensors of at most {MOST_SHARED} times the size of {path}, got "
            f"{taken} bytes from {size}, most in {largest:.100}; save a copy of each tensor"
        )
    return weights


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _check_archive(path: Path) -> None:
    """Raise ValueError for TorchScript, and for content that could fill the memory."""
    if path.stat().st_size == 0:
        raise ValueError(
            f"source: expected only tensors, numbers and texts in {path}, got an empty file"
        )
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        if content.find(b"bytearray") >= 0:  # torch.load would allocate one of any size
            raise ValueError(f"source: expected only tensors in {path}, got a bytearray")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            is_compressed = any(each.compress_type != zipfile.ZIP_STORED for each in members)
            is_script = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, LookupError):
        return  # the older format, or a damaged file, for which torch.load raises an error
    if is_script:
        raise ValueError(
            f"source: expected only tensors in {path}, got TorchScript, which is code, as in "
            "OpenAI's CLIP files; if you trust it, torch.save(torch.jit.load(..).state_dict(), ..)"
        )
    if is_compressed or unpacked > path.stat().st_size:
        raise ValueError(
            f"source: expected an uncompressed file, as torch.save writes it, got {path} of "
            f"{path.stat().st_size} bytes, which would unpack to {unpacked}; save it again"
        )


def _state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        wrapped = (content.get(name) for name in ("state_dict", "model"))
        content = next((inner for inner in wrapped if isinstance(inner, dict)), content)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"source: expected a dict of tensors, got {type(content).__name__} {path}")
    others = [
        name[:100] if isinstance(name, str) else f"a key of type {type(name).__name__}"
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if others:
        raise ValueError(
            "source: expected a state dict, bare or under 'state_dict' or 'model', got other "
            f"values in {path}: {', '.join(others[:10])}"
        )
    return content
