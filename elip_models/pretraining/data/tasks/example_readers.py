"""`open_examples` opens the data of a downstream task that one line, or a mapping, names.

    vqa             emoji_questions:seed=0,size=2000
                    questions.json,annotations.json,images=coco,answers=answer_list.json
                    vqa_train.json,vqa_val.json,images=coco                 lists of ALBEF, BLIP
    entailment      emoji_entailment:seed=0,size=2000
                    snli_ve_train.jsonl,images=flickr30k-images;  ve_train.json,images=..
    nlvr2           emoji_pairs:seed=0,size=2000
                    train.json,images=images/train;  nlvr_train.json,images=..
    grounding       emoji_grounding:seed=0,size=200;  refcoco+.json,images=coco,split=testA
    classification  emoji_classes:seed=0,size=600;  FOLDER;  datasets:NAME_OR_FOLDER,split=test

A mapping has the fields of `FileSpec`: {files: [questions.json, ..], images: coco}.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from elip_models.pretraining.data.checks import check_not_empty, existing_files
from elip_models.pretraining.data.class_sources import ClassExamples, open_classes
from elip_models.pretraining.data.data_spec import Spec, built_in_options, parse_files
from elip_models.pretraining.data.examples import ExampleSource
from elip_models.pretraining.data.mixture import ConcatExamples
from elip_models.pretraining.data.tasks.entailment import EmojiEntailment
from elip_models.pretraining.data.tasks.file_examples import (
    grounding_examples,
    labelled_examples,
    vqa_examples,
)
from elip_models.pretraining.data.tasks.grounding import EmojiGrounding
from elip_models.pretraining.data.tasks.pairs import EmojiPairs
from elip_models.pretraining.data.tasks.questions import EmojiQuestions
from elip_models.validation import PositiveInt, check

ExampleTask = Literal["vqa", "entailment", "nlvr2", "classification", "grounding"]

BUILT_IN = {
    "vqa": EmojiQuestions,
    "entailment": EmojiEntailment,
    "nlvr2": EmojiPairs,
    "grounding": EmojiGrounding,
}
_READERS = {
    "vqa": (vqa_examples, ("images", "answers", "weight")),
    "entailment": (partial(labelled_examples, "entailment"), ("images",)),
    "nlvr2": (partial(labelled_examples, "nlvr2"), ("images",)),
    "grounding": (grounding_examples, ("images", "split")),
}
"""Task: the reader of its files, and the options that it takes."""


def open_examples(
    task: ExampleTask, spec: Spec | Sequence[Spec], *, image_size: int
) -> ExampleSource:
    """Open the data that `spec` names, see the top of this file.

    Args:
        task: Name of the task.
        spec: One line, a mapping, or a list of them, which are concatenated.
        image_size: Size in pixels of built-in images. Stored images keep their size.

    Raises:
        TypeError, ValueError: The specification or a file is malformed, or has no example.
        FileNotFoundError: A file is missing.
    """
    check("task", task, ExampleTask)
    check("image_size", image_size, PositiveInt)
    if isinstance(spec, list | tuple):
        check_not_empty("spec", spec)
        sources = [open_examples(task, part, image_size=image_size) for part in spec]
        return sources[0] if len(sources) == 1 else ConcatExamples(sources)
    if task == "classification":
        return ClassExamples(open_classes(spec, image_size=image_size, needs_names=False))
    name = BUILT_IN[task].name
    for other, source in BUILT_IN.items():
        if (options := built_in_options(spec, source.name)) is None:
            continue
        if other != task:
            got = f"{source.name}, which is for {other}"
            raise ValueError(f"spec: expected {name} or files, got {got}")
        return source(**options, image_size=image_size)
    read, allowed = _READERS[task]
    named = parse_files(spec, allowed, f"{name}:size=2000 or files")
    examples = read(named, existing_files("spec", named.files))
    check_not_empty("spec", examples, spec)
    return examples
