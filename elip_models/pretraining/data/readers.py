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
grounding       emoji_grounding:seed=0,size=200;  refcoco+.json,images=coco,split=testA
classification  emoji_classes:seed=0,size=600;  FOLDER;  datasets:NAME_OR_FOLDER,split=test
composition     emoji_composition:seed=1,size=200
winoground/examples.jsonl,images=winoground/images
visual_genome_relation.json,images=vg;  coco_order.json,images=coco
sugarcrepe/swap_obj.json,images=val2017;  sugarcrepe,images=val2017
"""

import glob
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from elip_models.pretraining.data.checks import check_not_empty, expand_user
from elip_models.pretraining.data.class_sources import ClassExamples, open_classes
from elip_models.pretraining.data.data_spec import (
    FileSpec,
    Spec,
    built_in_options,
    expand_ranges,
    parse_files,
)
from elip_models.pretraining.data.examples import ExampleSource
from elip_models.pretraining.data.json_source import JsonSource
from elip_models.pretraining.data.mixture import ConcatExamples, MixedSource
from elip_models.pretraining.data.sample import Source
from elip_models.pretraining.data.scenes import EmojiScenes
from elip_models.pretraining.data.shard_source import ShardSource
from elip_models.pretraining.data.streams import is_stream, redacted
from elip_models.pretraining.data.tasks.composition_files import CompositionFiles, CompositionSource
from elip_models.pretraining.data.tasks.emoji_composition import EmojiComposition
from elip_models.pretraining.data.tasks.emoji_grounding import EmojiGrounding
from elip_models.pretraining.data.tasks.entailment import EmojiEntailment
from elip_models.pretraining.data.tasks.file_examples import (
    grounding_examples,
    labelled_examples,
    vqa_examples,
)
from elip_models.pretraining.data.tasks.pairs import EmojiPairs
from elip_models.pretraining.data.tasks.questions import EmojiQuestions
from elip_models.validation import PositiveInt, check, shortened

ExampleTask = Literal["vqa", "entailment", "nlvr2", "classification", "grounding"]


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
        check_not_empty("spec", spec)
        options = {"image_size": image_size, "needs_captions": needs_captions}
        sources = [open_source(part, **options) for part in spec]
        return sources[0] if len(sources) == 1 else MixedSource(sources)
    if is_stream(spec):
        raise ValueError(
            f"spec: expected data on disk, whose samples can be counted, got {redacted(spec)!r}; "
            "use a stream as the only data.train of pre-training, or with `elip data check`"
        )
    return _open("captions", spec, image_size, needs_captions=needs_captions)


def open_examples(
    task: ExampleTask, spec: Spec | Sequence[Spec], *, image_size: int
) -> ExampleSource:
    """Open the examples of a task, see the top of this file.

    Args:
        task: Name of the task.
        spec: One line, a mapping, or a list of them, which are concatenated.
        image_size: Size in pixels of built-in images. Stored images keep their size.

    Raises:
        TypeError, ValueError: The specification or a file is malformed, or has no example.
        FileNotFoundError: A file is missing.
    """
    check("task", task, ExampleTask)
    if isinstance(spec, list | tuple):
        check_not_empty("spec", spec)
        sources = [open_examples(task, part, image_size=image_size) for part in spec]
        return sources[0] if len(sources) == 1 else ConcatExamples(sources)
    if task == "classification":
        return ClassExamples(open_classes(spec, image_size=image_size, needs_names=False))
    return _open(task, spec, image_size)


def open_composition(spec: Spec, *, image_size: int) -> CompositionSource:
    """Open a compositional benchmark; the arguments and errors are those of `open_examples`."""
    return _open("composition", spec, image_size)


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

    name: str
    built_in: Callable[..., Any]
    read: Callable[..., Any]
    options: tuple[str, ...] = ("images",)
    files: str = "*.json"


_KINDS = {
    "captions": _Kind("emoji_scenes", EmojiScenes, _read_captions, ("images", "split"), "*.tar"),
    "vqa": _Kind("emoji_questions", EmojiQuestions, vqa_examples, ("images", "answers", "weight")),
    "entailment": _Kind(
        "emoji_entailment", EmojiEntailment, partial(labelled_examples, "entailment")
    ),
    "nlvr2": _Kind("emoji_pairs", EmojiPairs, partial(labelled_examples, "nlvr2")),
    "grounding": _Kind("emoji_grounding", EmojiGrounding, grounding_examples, ("images", "split")),
    "composition": _Kind("emoji_composition", EmojiComposition, CompositionFiles),
}


def _open(kind: str, spec: Spec, image_size: int, **options: bool) -> Any:
    check("image_size", image_size, PositiveInt)
    chosen = _KINDS[kind]
    for other, (name, built_in, *_) in _KINDS.items():
        if (drawn := built_in_options(spec, name, built_in)) is None:
            continue
        if other != kind:
            got = f"{name}, which is for {other}"
            raise ValueError(f"spec: expected {chosen.name} or files, got {got}")
        return built_in(**drawn, image_size=image_size)
    named = parse_files(spec, chosen.options, f"{chosen.name}:size=2000 or files")
    files = [file for part in named.files for file in _expand(part, chosen.files)]
    source = chosen.read(named, files, **options)
    check_not_empty("spec", source, spec)
    return source


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
    if not names or not all(map(os.path.isfile, names)):
        wanted = f"a folder with {pattern}" if os.path.isdir(plain) else "an existing file"
        absent = next((name for name in names if not os.path.isfile(name)), path)
        raise FileNotFoundError(
            f"spec: expected {wanted}, got {shortened(absent)}; the working folder is {Path.cwd()}"
        )
    return [Path(name) for name in names]
