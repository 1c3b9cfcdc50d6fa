"""Functions that open the data that one line, or a mapping with the fields of `FileSpec`, names.

captions        emoji_scenes:seed=0,size=50000
list.json;  dataset_coco.json,images=coco,split=test
train-*.tar;  train-{0000..0003}.tar;  a folder of tars
vqa             emoji_questions:seed=0,size=2000
questions.json,annotations.json,images=coco,answers=answer_list.json
vqa_train.json,vqa_val.json,images=coco                 lists of ALBEF, BLIP
entailment      emoji_entailment:seed=0,size=2000
snli_ve_train.jsonl,images=flickr30k-images;  ve_train.json,images=..
nlvr2           emoji_pairs:seed=0,size=2000
train.json,images=images/train;  nlvr_train.json,images=..
classification  emoji_classes:seed=0,size=600;  FOLDER;  datasets:NAME_OR_FOLDER,split=test
"""

import glob
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from elip_models.pretraining.data.class_sources import ClassExamples, open_classes
from elip_models.pretraining.data.data_spec import (
    FileSpec,
    Spec,
    built_in_options,
    expand_ranges,
    expand_user,
    parse_files,
)
from elip_models.pretraining.data.derived_sources import ConcatExamples, MixedSource
from elip_models.pretraining.data.emoji_tasks import EmojiEntailment, EmojiPairs, EmojiQuestions
from elip_models.pretraining.data.example_files import labelled_examples, vqa_examples
from elip_models.pretraining.data.json_source import JsonSource
from elip_models.pretraining.data.samples import ExampleSource, Source
from elip_models.pretraining.data.scenes import EmojiData, EmojiScenes
from elip_models.pretraining.data.shard_source import ShardSource
from elip_models.pretraining.data.streams import is_stream, redacted
from elip_models.validation import PositiveInt, check, shortened

ExampleTask = Literal["vqa", "entailment", "nlvr2", "classification"]


def open_source(
    spec: Spec | Sequence[Spec], *, image_size: int, needs_captions: bool = True
) -> Source:
    """Open images with captions, see the top of this file.

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
    if isinstance(spec, list | tuple):
        options = {"image_size": image_size, "needs_captions": needs_captions}
        return _joined(spec, MixedSource, partial(open_source, **options))
    if is_stream(spec):
        raise ValueError(
            f"spec: expected data on disk, whose samples can be counted, got {redacted(spec)!r}; "
            "use a stream as the only data.train of pre-training, or with `elip data check`"
        )
    return _open("captions", spec, image_size, needs_captions=needs_captions)


def open_examples(
    task: ExampleTask, spec: Spec | Sequence[Spec], *, image_size: int
) -> ExampleSource:
    """Open the examples of a task, as `open_source` opens images with captions."""
    check("task", task, ExampleTask)
    if isinstance(spec, list | tuple):
        return _joined(spec, ConcatExamples, partial(open_examples, task, image_size=image_size))
    if task == "classification":
        return ClassExamples(open_classes(spec, image_size=image_size, needs_names=False))
    return _open(task, spec, image_size)


def _joined(specs: Sequence[Spec], join: type, open_one: Callable[[Spec], Any]) -> Any:
    sources = [open_one(spec) for spec in specs]
    return sources[0] if len(sources) == 1 else _not_empty(join(sources), specs)


def _not_empty(source: Any, spec: Spec | Sequence[Spec]) -> Any:
    if len(source) == 0:
        raise ValueError(f"spec: expected at least one sample, got none in {shortened(spec)}")
    return source


def _read_captions(spec: FileSpec, files: list[Path], *, needs_captions: bool) -> Source:
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".tar"} and spec.images is None and spec.split is None:
        return ShardSource(files)
    if not kinds <= {".json", ".jsonl"}:
        raise ValueError(
            f"spec: expected files that are all .json, or all .tar and then no options, got "
            f"{sorted(kinds)}; write one spec for each kind"
        )
    options = {"image_root": spec.images, "split": spec.split}
    return JsonSource(files, **options, needs_captions=needs_captions)


class _Kind(NamedTuple):
    """The built-in data, the reader of files with its options, and the files of a folder."""

    built_in: type[EmojiData]
    read: Callable[..., Any]
    options: tuple[str, ...] = ("images",)
    files: str = "*.json"


_KINDS = {
    "captions": _Kind(EmojiScenes, _read_captions, ("images", "split"), "*.tar"),
    "vqa": _Kind(EmojiQuestions, vqa_examples, ("images", "answers", "weight")),
    "entailment": _Kind(EmojiEntailment, partial(labelled_examples, "entailment")),
    "nlvr2": _Kind(EmojiPairs, partial(labelled_examples, "nlvr2")),
}


def _open(kind: str, spec: Spec, image_size: int, **options: bool) -> Any:
    check("image_size", image_size, PositiveInt)
    expected = _KINDS[kind]
    for other, (built_in, *_) in _KINDS.items():
        if (drawn := built_in_options(spec, built_in)) is None:
            continue
        if other != kind:
            got = f"{built_in.name}, which is for {other}"
            raise ValueError(f"spec: expected {expected.built_in.name} or files, got {got}")
        return built_in(**drawn, image_size=image_size)
    named = parse_files(spec, expected.options, f"{expected.built_in.name}:size=2000 or files")
    files = [file for path in named.files for file in _expand(path, expected.files)]
    return _not_empty(expected.read(named, files, **options), spec)


def _expand(path: str, pattern: str) -> list[Path]:
    """Return the files that a path, range, glob or folder names, in order; at least one."""
    plain = expand_user(path)
    if os.path.isdir(plain):
        names = [str(file) for file in sorted(plain.glob(pattern))]
    elif os.path.isfile(plain):  # whose name may look like a pattern
        names = [str(plain)]
    else:
        ranges = expand_ranges(str(plain))
        names = [match for name in ranges for match in sorted(glob.glob(name)) or [name]]
    absent = [name for name in names if not os.path.isfile(name)]
    if absent or not names:
        wanted = "an existing file" if names else f"a folder with {pattern}"
        raise FileNotFoundError(
            f"spec: expected {wanted}, got {shortened([*absent, path][0])}; the working folder is "
            f"{Path.cwd()}"
        )
    return [Path(name) for name in names]
