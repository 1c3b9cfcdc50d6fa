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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elip_models.pretraining.data.checks import expand_user
from elip_models.pretraining.data.data_spec import FileSpec
from elip_models.pretraining.data.json_files import read_fields, read_json
from elip_models.pretraining.data.tasks.file_examples import FileExamples, StoredExample
from elip_models.pretraining.data.tasks.vqa_answers import normalise_answer

_EXPECTED = (
    'VQA v2\'s {"questions": ..} or {"annotations": ..}, or a list of {"image", "question", '
    '"answer"}'
)
_TEST_IMAGES = {"test-dev2015": "test2015"}
MIN_FIRST_ANSWERS = 9
"""Questions whose first answer a text must be, to be in a list made from the data."""


def vqa_examples(spec: FileSpec, files: Sequence[Path]) -> FileExamples:
    """Read questions, and their answers if the files have any."""
    loaded = {file: read_json(file, _EXPECTED) for file in files}
    for file, data in loaded.items():
        keys = data.keys() if isinstance(data, dict) else set()
        if not isinstance(data, list) and not {"questions", "annotations"} & keys:
            raise ValueError(f"{file}: expected {_EXPECTED}, got {data!r:.200}")
    annotations = _annotations(loaded)
    rows, first_answers = [], Counter()
    for file, data in loaded.items():
        root = file.parent if spec.images is None else expand_user(spec.images)
        read = _list_questions(file, data, root, len(rows)) if isinstance(data, list) else None
        for row, first in read or _questions(file, data, root, annotations):
            shares = {answer: spec.weight * share for answer, share in row.answers.items()}
            rows.append(row._replace(answers=shares))
            first_answers.update((first,) if first else ())
    return FileExamples(rows, _answer_list(spec, first_answers))


def _annotations(loaded: dict[Path, Any]) -> dict[int, tuple[list[str], str]] | None:
    """Return all answers and the first answer of each question; None without annotation files."""
    found, any_file = {}, False
    for file, data in loaded.items():
        if not isinstance(data, dict) or "annotations" not in data:
            continue
        any_file = True
        for number, entry in enumerate(read_fields(str(file), data, annotations=list)[0]):
            where = f"{file}[annotations][{number}]"
            fields = {"question_id": int, "answers": list, "multiple_choice_answer": str}
            question, given, first = read_fields(where, entry, **fields)
            answers = [
                read_fields(f"{where}[answers][{i}]", each, answer=str)[0]
                for i, each in enumerate(given)
            ]
            if not answers:
                raise ValueError(f"{where}: answers: expected at least one, got none")
            found[question] = (answers, normalise_answer(first))
    return found if any_file else None


def _questions(
    file: Path,
    data: dict[str, Any],
    root: Path,
    annotations: dict[int, tuple[list[str], str]] | None,
) -> Iterator[tuple[StoredExample, str | None]]:
    """Yield the questions of a VQA v2 file, each with its first answer."""
    if "questions" not in data:
        return
    questions, subset = read_fields(str(file), data, questions=list, data_subtype=str)
    subset = _TEST_IMAGES.get(subset, subset)
    folder = root / subset if os.path.isdir(root / subset) else root  # a name may be too long
    for number, entry in enumerate(questions):
        where = f"{file}[questions][{number}]"
        fields = {"question_id": int, "image_id": int, "question": str}
        question_id, image, question = read_fields(where, entry, **fields)
        given, first = [], None
        if annotations is not None:
            if question_id not in annotations:
                raise ValueError(
                    f"{where}: question_id: expected one with an annotation, got {question_id}"
                )
            given, first = annotations[question_id]
        path = folder / f"COCO_{subset}_{image:012d}"
        entry_name = f"{file.name}[questions][{number}]"
        yield StoredExample(entry_name, str(question_id), question, _shares(given), (path,)), first


def _list_questions(
    file: Path, data: list[Any], root: Path, before: int
) -> Iterator[tuple[StoredExample, str | None]]:
    """Yield the questions of a list, each with its most frequent answer."""
    for number, entry in enumerate(data):
        where = f"{file}[{number}]"
        image, question = read_fields(where, entry, image=str, question=str)
        given = entry.get("answer", [])
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
            raise ValueError(f"{where}: answer: expected a text or a list of texts, got {given!r}")
        shares = _shares(given)
        question_id = str(entry.get("question_id", before + number))
        row = StoredExample(
            f"{file.name}[{number}]", question_id, question, shares, (root / image,)
        )
        yield row, max(shares, key=shares.get, default=None)


def _shares(given: list[str]) -> dict[str, float]:
    return {answer: count / len(given) for answer, count in Counter(given).items()}


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
    listed = read_json(file, "a list of texts")
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise ValueError(f"{file}: expected a list of texts, got {listed!r:.200}")
    twice = [answer for answer, count in Counter(listed).items() if count > 1]
    if twice:
        raise ValueError(f"{file}: expected each answer once, got {twice[0]!r} again")
    return tuple(listed)
