"""Examples of the tasks in files, as their authors publish them and as ALBEF and BLIP list them.

    vqa         {"questions": [{"question_id", "image_id", "question"}, ..], "data_subtype"}
                {"annotations": [{"question_id", "answers": [{"answer"}, ..],
                                  "multiple_choice_answer"}, ..]}
                [{"image", "question", "question_id", "answer": a list of ten, or one text}, ..]
    entailment  {"Flickr30K_ID", "sentence2", "gold_label", "pairID"}          one object per line
                [{"image": Flickr30k's id, "sentence", "label"}, ..]
    nlvr2       {"identifier", "sentence", "label", "directory" (training)}    one object per line
                [{"images": [path, path], "sentence", "label"}, ..]

Questions without annotations, such as those of the test set, have no answers. Answers stay as
people wrote them; the metric normalises them, see `answers`. NLVR2's training images are in
numbered folders below the folder of images.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from elip_models.analysis.answer_scores import normalise_answer
from elip_models.images import SampleError
from elip_models.pretraining.data.data_spec import FileSpec, expand_user
from elip_models.pretraining.data.file_rows import (
    FileRow,
    StoredRows,
    image_folder,
    read_rows,
    stored_row,
)
from elip_models.pretraining.data.json_files import read_json, validate
from elip_models.pretraining.data.samples import Example
from elip_models.validation import shortened

MIN_FIRST_ANSWERS = 9
"""Questions whose first answer a text must be, to be in a list made from the data."""
_TEST_IMAGES = {"test-dev2015": "test2015"}
_LABELS = {
    "entailment": ("entailment", "neutral", "contradiction"),
    "nlvr2": ("false", "true"),
}
_IMAGES = {"entailment": 1, "nlvr2": 2}


class FileExamples(StoredRows):
    """An `ExampleSource` over stored examples, with `answers`, all possible answers.

    A missing or damaged image and an empty text raise SampleError for that example only.
    """

    def __init__(self, rows: list[dict[str, Any]], answers: tuple[str, ...]) -> None:
        super().__init__(rows)
        self.answers = answers

    def __getitem__(self, index: int) -> Example:
        row = self._row(index)
        if not row["text"].strip():
            raise SampleError(row["place"], "the text is empty")
        return self.text_alone(index)._replace(images=self._images(row))

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is decoded."""
        row = self._row(index)
        answers = dict(zip(row["answers"], row["weights"], strict=True))
        return Example((), row["text"], answers, row["id"])


def _example(
    spec: FileSpec, file: Path, place: int | str, row: FileRow, number: int
) -> dict[str, Any]:
    """Return a row of `FileExamples`, whose id is `number` if the file has none.

    The weight of an answer is the share of the people who gave it, times `spec.weight`.
    """
    counts = Counter(row.answers)
    weights = [spec.weight * (count / len(row.answers)) for count in counts.values()]
    texts = {"text": " ".join(row.texts), "answers": [*counts], "weights": weights}
    return stored_row(row, file, place, spec.images) | texts | {"id": row.id or str(number)}


def labelled_examples(
    task: Literal["entailment", "nlvr2"], spec: FileSpec, files: Sequence[Path]
) -> FileExamples:
    """Read hypotheses about an image, or statements about two images, with their labels."""
    examples: list[dict[str, Any]] = []
    for file in files:
        data = read_json(file, "rows with the key sentence or sentence2")
        rows = read_rows(data, file, "sentence", "sentence2", images=_IMAGES[task])
        for place, row in rows.items():
            row.answers = [label.lower() for label in row.answers]
            if row.answers not in [[label] for label in _LABELS[task]]:
                raise ValueError(
                    f"{file}[{place}]: label: expected one of {', '.join(_LABELS[task])}, got "
                    f"{', '.join(row.answers) or 'none'}"
                )
            examples.append(_example(spec, file, place, row, len(examples)))
    return FileExamples(examples, _LABELS[task])


def vqa_examples(spec: FileSpec, files: Sequence[Path]) -> FileExamples:
    """Read questions, and their answers if the files have any.

    The possible answers are a JSON list of texts, such as ALBEF's answer_list.json. Without a list,
    they are the answers that are the first answer of at least nine questions, normalised for
    annotations, as in METER: 3,129 for the training and validation sets.
    """
    annotations: dict[str, FileRow] = {}
    questions: dict[Path, dict[int | str, FileRow]] = {}
    for file in files:
        data = read_json(file, "VQA v2's questions or annotations, or a list of questions")
        if isinstance(data, dict) and "annotations" in data:
            where, key = f"{file}[annotations]", "multiple_choice_answer"
            rows = read_rows(data["annotations"], where, key, images=0)
            annotations |= {row.id: row for row in rows.values()}
        elif isinstance(data, dict) and "questions" in data:
            questions[file] = _official_questions(data, file, spec)
        else:
            questions[file] = read_rows(data, file, "question")
    examples: list[dict[str, Any]] = []
    first_answers: Counter[str] = Counter()
    for file, rows in questions.items():
        for place, row in rows.items():
            if annotations:
                if row.id not in annotations:
                    raise ValueError(
                        f"{file}[questions][{place}]: question_id: expected one with an "
                        f"annotation, got {row.id}"
                    )
                row.answers = annotations[row.id].answers
                first = [normalise_answer(annotations[row.id].first_answer)]
            else:
                first = [answer for answer, _ in Counter(row.answers).most_common(1)]
            first_answers.update(filter(None, first))
            examples.append(_example(spec, file, place, row, len(examples)))
    return FileExamples(examples, _answer_list(spec, first_answers))


def _official_questions(
    data: dict[str, Any], file: Path, spec: FileSpec
) -> dict[int | str, FileRow]:
    """Return the questions of a VQA v2 file, with the paths of their images."""
    subset = data.get("data_subtype")
    if not isinstance(subset, str):
        got = shortened(subset)
        raise ValueError(f"{file}[data_subtype]: expected a text such as 'val2014', got {got}")
    subset = _TEST_IMAGES.get(subset, subset)
    prefix = f"{subset}/" if os.path.isdir(image_folder(spec.images, file) / subset) else ""
    rows = read_rows(data["questions"], f"{file}[questions]", "question", images=0)
    for row in rows.values():
        row.images = [f"{prefix}COCO_{subset}_{row.image_id:0>12}"]
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
    answers = validate(tuple[str, ...], read_json(file, "a list of texts"), str(file))
    if twice := [answer for answer, count in Counter(answers).items() if count > 1]:
        raise ValueError(f"{file}: expected each answer once, got {twice[0]!r} again")
    return answers
