"""Examples of the tasks in files, as their authors publish them and as ALBEF and BLIP list them.

    entailment  {"Flickr30K_ID", "sentence2", "gold_label", "pairID"}          one object per line
                [{"image": Flickr30k's id, "sentence", "label"}, ..]
    nlvr2       {"identifier", "sentence", "label", "directory" (training)}    one object per line
                [{"images": [path, path], "sentence", "label"}, ..]
    grounding   [{"image", "text", "box", "split" (optional), "proposals" (optional)}, ..]

NLVR2's training images are in numbered folders below the folder of images. Boxes are [left, top,
width, height] in pixels of the stored image, as in COCO. `vqa_files` has the formats of VQA.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from elip_models.images import SampleError, open_image_file
from elip_models.pretraining.data.data_spec import FileSpec
from elip_models.pretraining.data.examples import Example
from elip_models.pretraining.data.file_rows import FileRow, StoredRows, read_rows
from elip_models.pretraining.data.scene_sampling import Box
from elip_models.pretraining.data.tasks.grounding import Target

_LABELS = {
    "entailment": ("entailment", "neutral", "contradiction"),
    "nlvr2": ("false", "true"),
}
_IMAGES = {"entailment": 1, "nlvr2": 2}


class FileExamples(StoredRows):
    """An `ExampleSource` over stored examples, with `answers`, all possible answers.

    A missing or damaged image and an empty text raise SampleError for that example only.
    """

    def __init__(
        self,
        files: Sequence[Path],
        spec: FileSpec,
        rows: list[dict[str, Any]],
        answers: tuple[str, ...] = (),
    ) -> None:
        super().__init__(files, spec.images, rows, spec.split)
        self.answers = answers

    def __getitem__(self, index: int) -> Example:
        row = self._row(index)
        if not row["text"].strip():
            raise SampleError(self._name(row), "the text is empty")
        return self.text_alone(index)._replace(images=self._images(row))

    def text_alone(self, index: int) -> Example:
        """Return the example without images; none is decoded."""
        row = self._row(index)
        answers = dict(zip(row["answers"], row["weights"], strict=True))
        return Example((), row["text"], answers, row["id"])


def example_row(
    file: int, place: int | str, row: FileRow, example_id: str, weight: float = 1.0
) -> dict[str, Any]:
    """Return a row of `FileExamples`. The weight of an answer is its share times `weight`."""
    counts = Counter(row.answers)
    return {
        "file": file,
        "place": str(place),
        "images": row.paths(),
        "text": row.text,
        "answers": [*counts],
        "weights": [weight * (count / len(row.answers)) for count in counts.values()],
        "id": example_id,
        "split": row.split,
    }


def labelled_examples(
    task: Literal["entailment", "nlvr2"], spec: FileSpec, files: Sequence[Path]
) -> FileExamples:
    """Read hypotheses about an image, or statements about two images, with their labels."""
    examples: list[dict[str, Any]] = []
    for number, file in enumerate(files):
        rows = read_rows(file, "sentence", "sentence2", images=_IMAGES[task])
        for place, row in rows.items():
            row.answers = [label.lower() for label in row.answers]
            if row.answers not in [[label] for label in _LABELS[task]]:
                raise ValueError(
                    f"{file}[{place}]: label: expected one of {', '.join(_LABELS[task])}, got "
                    f"{', '.join(row.answers) or 'none'}"
                )
            example_id = row.id or str(len(examples))  # over all files, so that ids are unique
            examples.append(example_row(number, place, row, example_id))
    return FileExamples(files, spec, examples, _LABELS[task])


class GroundingFiles(FileExamples):
    """Referring expressions, each with what it refers to."""

    def target(self, index: int) -> Target:
        """Return the boxes of an expression, and the size of its image."""
        row = self._row(index)
        proposals = row["proposals"]
        if proposals is not None:
            proposals = tuple(Box(*box) for box in proposals)
        with open_image_file(self._paths(row)[0], self._name(row)) as image:
            return Target(Box(*row["box"]), proposals, row["split"], image.size)


def grounding_examples(spec: FileSpec, files: Sequence[Path]) -> GroundingFiles:
    """Read referring expressions, all or those of some splits ("testA", "val+testA").

    Raises:
        ValueError: An entry is malformed, only some have proposals, or no entry is of the split.
    """
    examples = []
    for number, file in enumerate(files):
        for place, row in read_rows(file, "box").items():
            name = f"{file.name}[{place}]"
            for box in (row.box, *(row.proposals or ())):
                if box is None or min(box[2:]) <= 0:
                    raise ValueError(f"{name}: expected a width and height above 0, got {box}")
            row.texts = row.text.split()
            example = example_row(number, place, row, name)
            examples.append(example | {"box": row.box, "proposals": row.proposals})
    without = [example for example in examples if example["proposals"] is None]
    if 0 < len(without) < len(examples):
        raise ValueError(
            f"{without[0]['id']}: proposals: expected boxes in all entries or in none, got none "
            "here; write [] where the detector found nothing"
        )
    return GroundingFiles(files, spec, examples)
