"""The data sources on disk, and `open_source`, which opens what a specification names."""

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elip_models.pretraining.data.checks import check_not_empty, expand_user
from elip_models.pretraining.data.data_spec import expand_ranges, parse_files
from elip_models.pretraining.data.json_source import JsonSource
from elip_models.pretraining.data.mixture import MixedSource
from elip_models.pretraining.data.sample import Source
from elip_models.pretraining.data.scenes import EmojiScenes
from elip_models.pretraining.data.shard_source import ShardSource
from elip_models.pretraining.data.streams import is_stream, redacted
from elip_models.validation import PositiveInt, check, shortened

_BUILT_IN = "emoji_scenes"
_OPTIONS = ("seed", "size", "clutter", "textures")
_SWITCHES, _WORDS = ("textures",), {"true": True, "false": False}
_FORMS = (
    '"emoji_scenes:seed=0,size=50000", "list.json", "train-*.tar", "train-{0000..0003}.tar", '
    "a folder of tars, or a comma separated list of paths of one kind"
)

Spec = str | Mapping[str, Any]
"""One line, or a mapping with the fields of `FileSpec`."""


def open_source(
    spec: Spec | Sequence[Spec], *, image_size: int, needs_captions: bool = True
) -> Source:
    """Open the image-caption data that `spec` names.

        emoji_scenes:seed=0,size=50000               built-in scenes, options of `EmojiScenes`
        list.json; train-*.tar; train-{0000..0003}.tar; a folder of tars
        dataset_coco.json,images=coco,split=test     options of `FileSpec`

    Args:
        spec: One line, a mapping, or a list of them, which are joined in a `MixedSource`. A line
            can name several files, separated by commas, all JSON or all tar.
        image_size: Size in pixels of built-in scenes. Stored images keep their size.
        needs_captions: False: JSON files may have images without captions, see `JsonSource`.

    Raises:
        TypeError, ValueError: The specification is malformed, names a stream (see `open_stream`),
            or the data has no sample.
        FileNotFoundError: No file matches.
    """
    check("image_size", image_size, PositiveInt)
    got = shortened(spec)
    if isinstance(spec, list | tuple):
        check_not_empty("spec", spec)
        options = {"image_size": image_size, "needs_captions": needs_captions}
        sources = [open_source(each, **options) for each in spec]
        return sources[0] if len(sources) == 1 else MixedSource(sources)
    if is_stream(spec):
        raise ValueError(
            f"spec: expected data on disk, whose samples can be counted, got "
            f"{redacted(spec)!r}; use a "
            "stream as the only data.train of pre-training, or with `elip data check`"
        )
    if not isinstance(spec, str | Mapping):
        raise TypeError(f"spec: expected a text such as {_FORMS}, got {got}")
    name, _, options = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if name.strip() == _BUILT_IN:
        return EmojiScenes(**parse_options(spec, options, _OPTIONS), image_size=image_size)
    named = parse_files(spec, ("images", "split"))
    files = [file for part in named.files for file in _expand(part)]
    if not files:
        raise ValueError(f"spec: expected {_FORMS}, got {got}")
    kinds = {file.suffix.lower() for file in files}
    if kinds not in ({".json"}, {".tar"}):
        raise ValueError(
            f"spec: expected files that are all .json or all .tar, got {sorted(kinds)} in "
            f"{got}; write one spec for each kind"
        )
    if kinds == {".tar"}:
        if named.images or named.split:
            raise ValueError(f"spec: expected images and split with .json only, got {got}")
        return ShardSource(files)
    options = {"image_root": named.images, "split": named.split}
    source = JsonSource(files, **options, needs_captions=needs_captions)
    check_not_empty("spec", source, spec)
    return source


def parse_options(spec: str, options: str, allowed: Sequence[str]) -> dict[str, int | bool]:
    """Return {"seed": 0, "size": 100} for "seed=0,size=100"; `size` is required."""
    got = shortened(spec)
    parsed: dict[str, int | bool] = {}
    for option in filter(None, options.split(",")):
        name, _, value = (part.strip() for part in option.partition("="))
        if name not in allowed:
            known = f"{', '.join(allowed[:-1])} and {allowed[-1]}"
            raise ValueError(f"spec: expected the options {known}, got {shortened(name)} in {got}")
        if name in _SWITCHES:
            if value not in _WORDS:
                raise ValueError(f"spec: {name}: expected true or false, got {shortened(value)}")
            parsed[name] = _WORDS[value]
        elif value.isdecimal():
            parsed[name] = int(value)
        else:
            raise ValueError(f"spec: {name}: expected an int of 0 or more, got {shortened(value)}")
    if "size" not in parsed:
        raise ValueError(
            f"spec: expected a size, got {got}; write {spec.partition(':')[0]}:seed=0,size=500"
        )
    return parsed


def _expand(path: str) -> list[Path]:
    """Return the files that a path, range, glob or folder names, in order; at least one."""
    plain = expand_user(path)
    if os.path.isfile(plain):  # false too for a path that is too long, as `isdir` is
        return [plain]
    if os.path.isdir(plain):
        files = sorted(plain.glob("*.tar"))
        if not files:
            got = shortened(path)
            raise FileNotFoundError(f"spec: expected a folder of .tar files, got none in {got}")
        return files
    files = []
    for name in expand_ranges(str(plain)):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not matches or not os.path.isfile(matches[0]):
            raise FileNotFoundError(
                f"spec: expected an existing file, got {shortened(name)}; the working folder is "
                f"{Path.cwd()}"
            )
        files += [Path(match) for match in matches]
    return files
