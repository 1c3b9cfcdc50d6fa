"""VQA v2, in its published format and in the list format of ALBEF and BLIP.

    {"questions": [{"question_id", "image_id", "question"}, ..], "data_subtype": "val2014"}
    {"annotations": [{"question_id", "answers": [{"answer"}, ..], "multiple_choice_answer"}, ..]}
    [{"image": path, "question", "question_id", "answer": a list of ten, or one text}, ..]

Questions without annotations, such as those of the test set, have no answers. Answers stay as
people wrote them; the metric normalises them, see `vqa_answers`. The share of an answer is that of
the people who gave it.

The possible answers are a JSON list of texts, such as ALBEF's answer_list.json. Without a list,
they are the answers that are the first answer of at least nine questions, normalised for
annotations, as in METER: 3,129 for the training and validation sets.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from elip_models.pretraining.data.checks import expand_user
from elip_models.pretraining.data.data_spec import FileSpec
from elip_models.pretraining.data.file_rows import FileRow, Id, Text, as_rows
from elip_models.pretraining.data.json_files import read_json, validate
from elip_models.pretraining.data.tasks.file_examples import FileExamples, example_row
from elip_models.pretraining.data.tasks.vqa_answers import normalise_answer

_TEST_IMAGES = {"test-dev2015": "test2015"}
MIN_FIRST_ANSWERS = 9
"""Questions whose first answer a text must be, to be in a list made from the data."""


class _Question(BaseModel):
    question_id: Id
    image_id: int
    question: Text


class _Questions(BaseModel):
    questions: list[_Question]
    data_subtype: Text


class _Answer(BaseModel):
    answer: Text


class _Annotation(BaseModel):
    question_id: Id
    answers: list[_Answer] = Field(min_length=1)
    multiple_choice_answer: Text


class _Annotations(BaseModel):
    annotations: list[_Annotation]


def vqa_examples(spec: FileSpec, files: Sequence[Path]) -> FileExamples:
    """Read questions, and their answers if the files have any."""
    contents = {file: _read(file) for file in files}
    annotations = {
        annotation.question_id: annotation
        for content in contents.values()
        if isinstance(content, _Annotations)
        for annotation in content.annotations
    }
    examples: list[dict[str, Any]] = []
    first_answers: Counter[str] = Counter()
    for number, (file, content) in enumerate(contents.items()):
        if isinstance(content, _Annotations):
            continue
        folder = file.parent if spec.images is None else expand_user(spec.images)
        is_list = isinstance(content, dict)
        rows = content if is_list else _official(file, content, folder, annotations)
        for place, row in rows.items():
            row_id = row.id or str(len(examples))
            examples.append(example_row(number, place, row, row_id, spec.weight))
            if is_list:
                first = next(iter(Counter(row.answers).most_common(1)), ("", 0))[0]
            else:
                annotation = annotations.get(row_id)
                first = annotation and normalise_answer(annotation.multiple_choice_answer)
            first_answers.update([first] if first else [])
    return FileExamples([*contents], spec, examples, _answer_list(spec, first_answers))


def _read(file: Path) -> _Questions | _Annotations | dict[int | str, FileRow]:
    data = read_json(file, "VQA v2's questions or annotations, or a list of questions")
    if isinstance(data, dict) and "questions" in data:
        return validate(_Questions, data, str(file))
    if isinstance(data, dict) and "annotations" in data:
        return validate(_Annotations, data, str(file))
    return as_rows(data, str(file), "question")


def _official(
    file: Path, content: _Questions, folder: Path, annotations: dict[str, _Annotation]
) -> dict[int | str, FileRow]:
    """Return the questions of a VQA v2 file as the rows of a list."""
    subset = _TEST_IMAGES.get(content.data_subtype, content.data_subtype)
    prefix = f"{subset}/" if os.path.isdir(folder / subset) else ""
    rows: dict[int | str, FileRow] = {}
    for place, question in enumerate(content.questions):
        annotation = annotations.get(question.question_id)
        if annotations and annotation is None:
            raise ValueError(
                f"{file}[questions][{place}]: question_id: expected one with an annotation, "
                f"got {question.question_id}"
            )
        rows[place] = FileRow(
            image=f"{prefix}COCO_{subset}_{question.image_id:012d}",
            question=question.question,
            question_id=question.question_id,
            answer=[person.answer for person in annotation.answers] if annotation else [],
        )
    return rows


def _answer_list(spec: FileSpec, first_answers: Counter[str]) -> tuple[str, ...]:
    if spec.answers is None:
        listed = [answer for answer, count in first_answers.items() if count >= MIN_FIRST_ANSWERS]
        if first_answers and not listed:
            raise ValueError(
                f"answers: expected a file, or an answer that is the first of {MIN_FIRST_ANSWERS} "
                f"questions, got {len(first_answers)} rarer ones; add answers=answer_list.json"
            )
        return tuple(listed)
    file = expand_user(spec.answers)
    answers = validate(tuple[Text, ...], read_json(file, "a list of texts"), str(file))
    if twice := [answer for answer, count in Counter(answers).items() if count > 1]:
        raise ValueError(f"{file}: expected each answer once, got {twice[0]!r} again")
    return answers
