"""`export` writes the data of a task, with images, in the standard format of that task.

    vqa             questions.json, annotations.json as VQA v2's, answer_list.json
    entailment      snli_ve.jsonl as SNLI-VE's
    nlvr2           nlvr2.jsonl as NLVR2's
    classification  images/CLASS/.. as ImageNet's; parquet/ as CIFAR's on the hub, in order
    retrieval       dataset.json as Karpathy's
    captioning      captions.json as COCO's

Images are PNG files, since JPEG would change pixels, and therefore results.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from elip_models.pretraining.data.checks import expand_user
from elip_models.pretraining.data.examples import ExampleSource
from elip_models.pretraining.data.readers import open_examples, open_source
from elip_models.pretraining.data.sample import Source
from elip_models.pretraining.data.shared_images import group_by_image
from elip_models.validation import check, shortened

ExportedTask = Literal["vqa", "entailment", "nlvr2", "classification", "retrieval", "captioning"]
PEOPLE = 10
"""Number of people who answer each question of VQA v2."""


def export(task: ExportedTask, spec: str, folder: str | Path, *, image_size: int) -> list[str]:
    """Write the data that `spec` names to files.

    Args:
        task: Name of the task.
        spec: Data, as `open_examples` or `open_source` takes it.
        folder: A new or empty folder.
        image_size: Size in pixels of built-in images.

    Returns:
        The specifications that read the files.

    Raises:
        FileExistsError: The folder is not empty.
        SampleError: An example cannot be read.
    """
    check("task", task, ExportedTask)
    folder = expand_user(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"folder: expected a new or an empty folder, got {folder}")
    writer = _WRITERS[task]
    is_captions = task in ("retrieval", "captioning")
    source = (
        group_by_image(open_source(spec, image_size=image_size))
        if is_captions
        else open_examples(task, spec, image_size=image_size)
    )
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".unfinished.{os.getpid()}"
    try:
        (unfinished / "images").mkdir(parents=True)
        written = writer(source, unfinished)
        for each in sorted(unfinished.iterdir(), key=Path.is_file):  # the lists of images last
            each.rename(folder / each.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return [each.replace(str(unfinished), str(folder)) for each in written]


def _inside(name: str) -> str:
    """Return a name of a file or folder; raise ValueError if it leads elsewhere."""
    if name in ("", ".", "..") or {"/", "\0"} & {*name}:
        raise ValueError(f"name: expected a name without '/' or NUL, got {shortened(name)}")
    return name


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _write_lines(path: Path, entries: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def _vqa(source: ExampleSource, folder: Path) -> list[str]:
    questions, annotations = [], []
    for number in range(len(source)):
        image, text, answers, example_id = source[number]
        given = _of_people(answers, example_id)
        image[0].save(folder / "images" / f"COCO_emoji_{number:012d}.png")
        ids = {"question_id": number, "image_id": number}
        questions.append({**ids, "question": text})
        kind = {"yes": "yes/no", "no": "yes/no"}.get(given[0])
        annotations.append(
            {
                **ids,
                "question_type": " ".join(text.split()[:2]),
                "answer_type": kind or ("number" if given[0].isdecimal() else "other"),
                "multiple_choice_answer": given[0],
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                    for i, answer in enumerate(given)
                ],
            }
        )
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "emoji"}
    named = {"task_type": "Open-Ended", "questions": questions}
    _write_json(folder / "questions.json", head | named)
    _write_json(folder / "annotations.json", head | {"annotations": annotations})
    _write_json(folder / "answer_list.json", list(source.answers))
    files = f"{folder}/questions.json,{folder}/annotations.json"
    return [f"{files},images={folder}/images,answers={folder}/answer_list.json"]


def _of_people(answers: dict[str, float], example_id: str) -> list[str]:
    """Return the answers of ten people for the given shares, the most frequent answer first."""
    counts = {answer: PEOPLE * share for answer, share in answers.items()}
    given = [answer for answer, count in counts.items() for _ in range(round(count))]
    if len(given) != PEOPLE or any(abs(count - round(count)) > 1e-6 for count in counts.values()):
        raise ValueError(f"{example_id}: expected shares of {PEOPLE} people, got {answers}")
    return sorted(given, key=lambda answer: -counts[answer])


def _entailment(source: ExampleSource, folder: Path) -> list[str]:
    lines = []
    for number in range(len(source)):
        image, text, answers, example_id = source[number]
        (label,) = answers
        image[0].save(folder / "images" / f"{number}.png")
        names = {"Flickr30K_ID": str(number), "captionID": f"{number}.jpg#0", "pairID": example_id}
        texts = {"sentence1": "", "sentence2": text}
        lines.append({**names, **texts, "annotator_labels": [label], "gold_label": label})
    _write_lines(folder / "snli_ve.jsonl", lines)
    return [f"{folder}/snli_ve.jsonl,images={folder}/images"]


def _nlvr2(source: ExampleSource, folder: Path) -> list[str]:
    lines = []
    for number in range(len(source)):
        images, text, answers, example_id = source[number]
        (label,), example_id = answers, _inside(example_id)
        for side, image in enumerate(images):
            image.save(folder / "images" / f"{example_id}-img{side}.png")
        names = {"identifier": f"{example_id}-0", "left_url": "", "right_url": ""}
        lines.append({**names, "sentence": text, "label": label.capitalize()})
    _write_lines(folder / "nlvr2.jsonl", lines)
    return [f"{folder}/nlvr2.jsonl,images={folder}/images"]


def _classification(source: ExampleSource, folder: Path) -> list[str]:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for number in range(len(source)):
        image, _, answers, _ = source[number]
        (name,) = answers
        path = folder / "images" / _inside(name) / f"{number:06d}.png"
        path.parent.mkdir(exist_ok=True)
        image[0].save(path)
        rows["image"].append({"bytes": path.read_bytes(), "path": path.name})
        rows["label"].append(source.answers.index(name))
    names = ClassLabel(names=list(source.answers))
    table = Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": names}))
    (folder / "parquet").mkdir()
    table.to_parquet(folder / "parquet" / "test-00000-of-00001.parquet")
    return [f"{folder}/images", f"datasets:{folder}/parquet,split=test"]


def _retrieval(source: Source, folder: Path) -> list[str]:
    images = []
    for number in range(len(source)):
        image, captions, _ = source[number]
        name = f"{number:012d}.png"
        image.save(folder / "images" / name)
        sentences = [
            {"raw": text, "tokens": text.lower().split(), "imgid": number} for text in captions
        ]
        entry = {"filename": name, "imgid": number, "split": "test", "sentences": sentences}
        images.append(entry)
    _write_json(folder / "dataset.json", {"dataset": "emoji", "images": images})
    return [f"{folder}/dataset.json,images={folder}/images,split=test"]


def _captioning(source: Source, folder: Path) -> list[str]:
    images, annotations = [], []
    for number in range(len(source)):
        image, captions, _ = source[number]
        name = f"{number:012d}.png"
        image.save(folder / "images" / name)
        size = {"width": image.width, "height": image.height}
        images.append({"id": number, "file_name": name, **size})
        for text in captions:
            annotations.append({"id": len(annotations), "image_id": number, "caption": text})
    _write_json(folder / "captions.json", {"images": images, "annotations": annotations})
    return [f"{folder}/captions.json,images={folder}/images"]


_WRITERS: dict[str, Callable[[Any, Path], list[str]]] = {
    "vqa": _vqa,
    "entailment": _entailment,
    "nlvr2": _nlvr2,
    "classification": _classification,
    "retrieval": _retrieval,
    "captioning": _captioning,
}
