"""SNLI-VE and NLVR2, in their published formats and in the list formats of ALBEF and BLIP.

    {"Flickr30K_ID", "sentence2", "gold_label", "pairID"}         one object per line
    [{"image": Flickr30k's id, "sentence", "label"}, ..]
    {"identifier", "sentence", "label", "directory" (training)}    one object per line
    [{"images": [path, path], "sentence", "label"}, ..]

The labels have the order of `EmojiEntailment` and `EmojiPairs`. NLVR2's training images are in
numbered folders below the folder `images`.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from elip_models.pretraining.data.checks import expand_user
from elip_models.pretraining.data.data_spec import FileSpec
from elip_models.pretraining.data.json_files import read_entries, read_fields
from elip_models.pretraining.data.tasks.entailment import LABELS
from elip_models.pretraining.data.tasks.file_examples import FileExamples, StoredExample
from elip_models.pretraining.data.tasks.pairs import ANSWERS

_IDS = ("Flickr30K_ID", "Flikr30kID")
"""The files of 2018 have the second key, with .jpg in its values."""
_EXPECTED = {
    "entailment": "a list of {image, sentence, label}, or lines of SNLI-VE",
    "nlvr2": "a list of {images, sentence, label}, or lines of NLVR2",
}
Parsed = tuple[str, str, str, tuple[Path, ...]]
"""Id, text, label and images."""


def entailment_examples(spec: FileSpec, files: Sequence[Path]) -> FileExamples:
    """Read hypotheses about images."""
    return FileExamples(_rows(spec, files, "entailment", _parse_hypothesis, LABELS), LABELS)


def nlvr2_examples(spec: FileSpec, files: Sequence[Path]) -> FileExamples:
    """Read statements about two images each."""
    return FileExamples(_rows(spec, files, "nlvr2", _parse_statement, ANSWERS), ANSWERS)


def _rows(
    spec: FileSpec,
    files: Sequence[Path],
    task: str,
    parse: Callable[[str, Any, Path, str], Parsed],
    labels: tuple[str, ...],
) -> Iterator[StoredExample]:
    ids = count()  # over all files, so that ids are unique
    for file in files:
        root = file.parent if spec.images is None else expand_user(spec.images)
        for number, entry in enumerate(read_entries(file, _EXPECTED[task])):
            where, name = f"{file}[{number}]", f"{file.name}[{number}]"
            row_id, text, label, images = parse(where, entry, root, str(next(ids)))
            if label not in labels:
                expected = ", ".join(labels)
                raise ValueError(f"{where}: label: expected one of {expected}, got {label!r}")
            yield StoredExample(name, row_id, text, {label: spec.weight}, images)


def _parse_hypothesis(where: str, entry: Any, root: Path, number: str) -> Parsed:
    if isinstance(entry, dict) and "sentence2" in entry:
        key = next((key for key in _IDS if key in entry), _IDS[0])
        fields = {"sentence2": str, "gold_label": str, key: str, "pairID": str}
        text, label, image, row_id = read_fields(where, entry, **fields)
    else:
        image, text, label = read_fields(where, entry, image=str, sentence=str, label=str)
        row_id = number
    return row_id, text, label, (root / image,)


def _parse_statement(where: str, entry: Any, root: Path, number: str) -> Parsed:
    text, label = read_fields(where, entry, sentence=str, label=str | bool)
    if "identifier" in entry:
        (row_id,) = read_fields(where, entry, identifier=str)
        folder = root / str(entry["directory"]) if "directory" in entry else root
        pair = row_id.rpartition("-")[0]
        images = tuple(folder / f"{pair}-img{side}.png" for side in (0, 1))
    else:
        (paths,) = read_fields(where, entry, images=list)
        if len(paths) != 2 or not all(isinstance(path, str) for path in paths):
            raise ValueError(f"{where}: images: expected two paths, got {paths!r:.200}")
        row_id, images = number, tuple(root / path for path in paths)
    return row_id, text, str(label).lower(), images
