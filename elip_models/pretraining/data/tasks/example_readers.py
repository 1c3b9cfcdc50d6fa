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

from collections.abc import Mapping, Sequence
from typing import Literal

from elip_models.pretraining.data.checks import check_not_empty, existing_files
from elip_models.pretraining.data.class_sources import ClassExamples, open_labelled
from elip_models.pretraining.data.data_spec import parse_files
from elip_models.pretraining.data.examples import ExampleSource
from elip_models.pretraining.data.mixture import ConcatExamples
from elip_models.pretraining.data.readers import Spec, parse_options
from elip_models.pretraining.data.tasks.emoji_grounding import EmojiGrounding
from elip_models.pretraining.data.tasks.entailment import EmojiEntailment
from elip_models.pretraining.data.tasks.grounding import grounding_examples
from elip_models.pretraining.data.tasks.label_files import entailment_examples, nlvr2_examples
from elip_models.pretraining.data.tasks.pairs import EmojiPairs
from elip_models.pretraining.data.tasks.questions import EmojiQuestions
from elip_models.pretraining.data.tasks.vqa_files import vqa_examples
from elip_models.validation import PositiveInt, check, shortened

ExampleTask = Literal["vqa", "entailment", "nlvr2", "classification", "grounding"]

BUILT_IN = {
    "vqa": EmojiQuestions,
    "entailment": EmojiEntailment,
    "nlvr2": EmojiPairs,
    "grounding": EmojiGrounding,
}
_READERS = {
    "vqa": vqa_examples,
    "entailment": entailment_examples,
    "nlvr2": nlvr2_examples,
    "grounding": grounding_examples,
}
_OPTIONS = {"vqa": ("images", "answers", "weight"), "grounding": ("images", "split")}


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
        sources = [open_examples(task, each, image_size=image_size) for each in spec]
        return sources[0] if len(sources) == 1 else ConcatExamples(sources)
    if not isinstance(spec, str | Mapping):
        raise TypeError(f"spec: expected a text or a mapping, got {shortened(spec)}")
    if task == "classification":
        return ClassExamples(open_labelled(spec, image_size=image_size))
    name, _, options = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    name = name.strip()
    built_in = {source.name: each for each, source in BUILT_IN.items()}.get(name)
    if built_in not in (None, task):
        raise ValueError(
            f"spec: expected {BUILT_IN[task].name} or files, got {name}, which is for {built_in}"
        )
    if built_in is not None:
        allowed = ("seed", "size", "clutter", "textures")
        return BUILT_IN[task](**parse_options(spec, options, allowed), image_size=image_size)
    named = parse_files(spec, _OPTIONS.get(task, ("images",)))
    if not named.files:
        got = shortened(spec)
        raise ValueError(f"spec: expected {BUILT_IN[task].name}:size=2000 or files, got {got}")
    examples = _READERS[task](named, existing_files("spec", named.files))
    check_not_empty("spec", examples, spec)
    return examples
