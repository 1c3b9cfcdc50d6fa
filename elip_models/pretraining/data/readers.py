"""The data sources on disk, and `open_source`, which opens what a specification names."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from elip_models.pretraining.data.checks import check_not_empty, expand_user
from elip_models.pretraining.data.data_spec import (
    Spec,
    built_in_options,
    expand_ranges,
    parse_files,
)
from elip_models.pretraining.data.json_source import JsonSource
from elip_models.pretraining.data.mixture import MixedSource
from elip_models.pretraining.data.sample import Source
from elip_models.pretraining.data.scenes import EmojiScenes
from elip_models.pretraining.data.shard_source import ShardSource
from elip_models.pretraining.data.streams import is_stream, redacted
from elip_models.validation import PositiveInt, check, shortened

_FORMS = (
    '"emoji_scenes:seed=0,size=50000", "list.json", "train-*.tar", "train-{0000..0003}.tar", '
    "a folder of tars, or a comma separated list of paths of one kind"
)


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
    if isinstance(spec, list | tuple):
        check_not_empty("spec", spec)
        options = {"image_size": image_size, "needs_captions": needs_captions}
        sources = [open_source(part, **options) for part in spec]
        return sources[0] if len(sources) == 1 else MixedSource(sources)
    if is_stream(spec):
        raise ValueError(
            f"spec: expected data on disk, whose samples can be counted, got {redacted(spec)!r}; "
            "use a stream as the only data.train of pre-training, or with `elip data check`"
        )
    if (options := built_in_options(spec, "emoji_scenes", EmojiScenes)) is not None:
        return EmojiScenes(**options, image_size=image_size)
    named = parse_files(spec, ("images", "split"), _FORMS)
    files = [file for part in named.files for file in _expand(part)]
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".tar"} and named.images is None and named.split is None:
        return ShardSource(files)
    if not kinds <= {".json", ".jsonl"}:
        raise ValueError(
            f"spec: expected files that are all .json, or all .tar and then no options, got "
            f"{sorted(kinds)} in {shortened(spec)}; write one spec for each kind"
        )
    options = {"image_root": named.images, "split": named.split}
    source = JsonSource(files, **options, needs_captions=needs_captions)
    check_not_empty("spec", source, spec)
    return source


def _expand(path: str) -> list[Path]:
    """Return the files that a path, range, glob or folder names, in order; at least one."""
    plain = expand_user(path)
    if os.path.isdir(plain):
        names = [str(file) for file in sorted(plain.glob("*.tar"))]
    elif os.path.isfile(plain):  # whose name may look like a pattern
        names = [str(plain)]
    else:
        ranges = expand_ranges(str(plain))
        names = [match for name in ranges for match in sorted(glob.glob(name)) or [name]]
    if not names or not all(map(os.path.isfile, names)):
        wanted = "a folder of .tar files" if os.path.isdir(plain) else "an existing file"
        absent = next((name for name in names if not os.path.isfile(name)), path)
        raise FileNotFoundError(
            f"spec: expected {wanted}, got {shortened(absent)}; the working folder is {Path.cwd()}"
        )
    return [Path(name) for name in names]
