"""The task of `elip calibrate` from its options: which one, and on which images."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from elip_models.commands.image_folder import image_files, open_with_images, readable, sample_files
from elip_models.validation import ConfigError, as_config_error, require_extra, shortened

with require_extra("elip_models.commands"):
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from torch import nn

    from elip_models.calibration.task import Task
    from elip_models.commands.image_folder import ImageFiles

FOLDERS = "folders"
TASKS_OF = {
    "labels": ("head", "zero-shot", "probe", "own-probe"),
    "captions": ("retrieval",),
    "masks": ("segmentation", "segmentation-probe"),
    "questions": ("answers",),
    None: ("cosine", "neighbours"),
}
"""Option with the data -> the tasks that read them; None: those on images alone."""
TASKS = tuple(task for tasks in TASKS_OF.values() for task in tasks)
DATA_OF = {task: data for data, tasks in TASKS_OF.items() for task in tasks}
WITH_HEAD = ("head", "segmentation")
"""The tasks that read the output of the model's own head."""
UNLABELLED, LABELLED = 200, 2000
"""Images by default."""
KEPT_BYTES = 2**31  # of images in memory
Loss = Callable[..., Any]


class Source(NamedTuple):
    """The images, and what the options say of them: at most one of the others is no None."""

    images: Path
    labels: str | None
    captions: Path | None
    masks: Path | None
    questions: Path | None


class Opening(NamedTuple):
    """How the model is opened."""

    spec: str
    pretrained: bool
    device: str | None


class Prepared(NamedTuple):
    """A task, the dense model that it judges, and the file name of each image."""

    task: "Task"
    model: "nn.Module"
    names: list[str]


def prepare(
    opening: Opening,
    source: Source,
    task: str | Loss | None,
    *,
    count: int | None,
    seed: int,
    batch_size: int,
    answering: dict[str, Any],
    console: Console,
) -> Prepared:
    """Open the model, choose the task and read its images.

    Args:
        opening: how the model is opened.
        source: the images and their labels, captions or masks.
        task: a name of `TASKS`, a function of the user, or None for the one that model and data
            leave.
        count: of the images; None for the default of the task.
        seed: of the draw of images.
        batch_size: images in a batch.
        answering: the options `score` and `prompt` of `Answers`.
        console: where the choice is printed.

    Raises:
        ConfigError, ValueError: an option that does not fit the model or the data.
    """
    data, source = _data(source, task)
    if data == "questions":
        return _answers(opening, source, answering, count, seed, console)
    of_paths = _read(data, source)
    paths = list(of_paths)
    has_head = task in WITH_HEAD or (task is None and data in ("labels", "masks"))
    model, files = _opened(opening, paths, console, with_head=has_head)
    if task is None:
        task, reason = chosen_task(model, data, of_paths)
        console.print(escape(f"task: {task}, {reason}"), soft_wrap=True, highlight=False)
        if has_head and task not in WITH_HEAD:
            model, files = _opened(opening, paths, Console(quiet=True), with_head=False)
    if data == "masks":
        from elip_models.calibration.segmentation import whole_image_transform

        files.transform = whole_image_transform(model, files.transform)
    if task in ("probe", "own-probe"):
        files.paths = sample_by_class(of_paths, count, seed)
    else:
        files.paths = sample_files(paths, count or (LABELLED if data else UNLABELLED), seed)
    files.paths = [path for path, _ in readable(files, console)]
    names = [path.relative_to(source.images).as_posix() for path in files.paths]
    values = [of_paths[path] for path in files.paths]
    options = {"batch_size": batch_size}
    made = MAKERS[data](task, opening.spec, model, files, values, options)
    return Prepared(made, model, names)


def _data(source: Source, task: str | Loss | None) -> tuple[str | None, Source]:
    """Return the option with the data of the task, and the source with it."""
    options = " or ".join(f"--{name}" for name in source._fields[1:])
    given = [name for name in source._fields[1:] if getattr(source, name) is not None]
    if len(given) > 1:
        raise ConfigError(
            f"--{given[1]}: expected one of {options}, got --{given[0]} beside it; pass one"
        )
    data = given[0] if given else None
    if not isinstance(task, str):
        if task is not None and data in ("labels", "captions", "questions"):
            raise ConfigError(
                f"--{data}: expected none with a function of your own, which reads none, got "
                f"{getattr(source, data)}"
            )
        return data, source
    needed = DATA_OF[task]
    if needed == "labels" and data is None:
        return needed, source._replace(labels=FOLDERS)
    if data is None and needed is not None:
        raise ConfigError(f"--{needed}: expected one with --task {task}, got none")
    if data != needed:
        reads = "images alone" if needed is None else f"--{needed}"
        raise ConfigError(
            f"--{data}: expected none with --task {task}, which reads {reads}, got "
            f"{getattr(source, data)}"
        )
    return data, source


def _read(data: str | None, source: Source) -> dict[Path, Any]:
    """Return the class, the captions or the mask of each image, or None."""
    from elip_models.calibration.data import mask_files, read_captions

    if data == "captions":
        return dict(sorted(read_captions(source.captions, source.images).items()))
    paths = image_files(source.images)
    if data == "labels":
        return read_classes(source.labels, source.images, paths)
    if data == "masks":
        return dict(zip(paths, mask_files(paths, source.images, source.masks), strict=True))
    return dict.fromkeys(paths)


def _opened(
    opening: Opening, paths: list[Path], console: Console, *, with_head: bool
) -> "tuple[nn.Module, ImageFiles]":
    model, files = open_with_images(
        opening.spec,
        paths,
        console,
        pretrained=opening.pretrained,
        device=opening.device,
        with_head=with_head,
        kept_bytes=KEPT_BYTES,
    )
    return _dense(model, console), files


def _dense(model: "nn.Module", console: Console) -> "nn.Module":
    from elip_models.api import is_reduced, unreduce_

    if is_reduced(model):
        unreduce_(model)
        console.print("MODEL is reduced: its dense model is calibrated", highlight=False)
    return model


def chosen_task(model: "nn.Module", data: str | None, of_paths: dict[Path, Any]) -> tuple[str, str]:
    """Return the task that the model and the data leave, and why, in words."""
    from elip_models.calibration.class_names import head_classes, known_labels
    from elip_models.towers import as_image_text

    if data is None:
        return "cosine", "since there are no labels"
    if data == "captions":
        return "retrieval", "since the images have captions"
    if data == "masks":
        if type(model).__name__.endswith("ForSemanticSegmentation"):
            return "segmentation", "since the model has a head for it"
        return "segmentation-probe", "since the model has no head for it"
    labels = sorted(set(of_paths.values()))
    head = head_classes(model)
    if head is not None and known_labels(labels, head):
        return "head", f"since the labels are among the {len(head)} classes of the model's head"
    if as_image_text(model) is not None and not all(label.isdecimal() for label in labels):
        return "zero-shot", "since the model compares images with the names of the classes"
    other = "the labels are no classes of the model's head" if head else "the model has no head"
    return "probe", f"since {other}"


def _feature_task(
    task: str | Loss,
    spec: str,
    model: "nn.Module",
    files: "ImageFiles",
    values: Sequence[None],
    options: dict[str, Any],
) -> "Task":
    from elip_models.analysis.model_features import image_features
    from elip_models.calibration.features import Cosine, Neighbours, OwnLoss

    options["features"], _ = image_features(model)
    if not isinstance(task, str):
        return OwnLoss(files, loss=task, **options)
    return {kind.name: kind for kind in (Cosine, Neighbours)}[task](files, **options)


def _class_task(
    task: str,
    spec: str,
    model: "nn.Module",
    files: "ImageFiles",
    labels: Sequence[str],
    options: dict[str, Any],
) -> "Task":
    import torch

    from elip_models.analysis.model_features import image_features
    from elip_models.calibration.class_names import class_numbers, head_classes, names_in_texts
    from elip_models.calibration.classes import Head, Probe, ZeroShot

    named = sorted(set(labels))
    number_of = {name: i for i, name in enumerate(named)}
    if task == "head":
        head = head_classes(model)
        if head is None:
            raise ConfigError(
                f"--task: expected head with a classifier, got a {type(model).__name__} without "
                "one; pass --task probe"
            )
        number_of = class_numbers(named, head)
    numbers = torch.tensor([number_of[label] for label in labels])
    if task == "head":
        shown = [(*names, str(i))[0] for i, names in enumerate(head)]
        return Head(files, numbers, classes=shown, **options)
    if task == "zero-shot":
        options["tokenizer"] = _tokenizer(task, spec, model)
        return ZeroShot(files, numbers, model=model, classes=names_in_texts(named), **options)
    options["features"], _ = image_features(model)
    return Probe(files, numbers, own=task == "own-probe", classes=named, **options)


def _retrieval(
    task: str,
    spec: str,
    model: "nn.Module",
    files: "ImageFiles",
    captions: Sequence[Sequence[str]],
    options: dict[str, Any],
) -> "Task":
    from elip_models.calibration.retrieval import Retrieval

    tokenizer = _tokenizer(task, spec, model)
    return Retrieval(files, captions, model=model, tokenizer=tokenizer, **options)


def _segmentation(
    task: str | Loss,
    spec: str,
    model: "nn.Module",
    files: "ImageFiles",
    masks: Sequence[Path],
    options: dict[str, Any],
) -> "Task":
    from elip_models.calibration.data import MaskFiles
    from elip_models.calibration.segmentation import Segmentation, SegmentationProbe

    of_files = MaskFiles(masks, files.paths)
    if task == SegmentationProbe.name:
        return SegmentationProbe(files, of_files, model=model, **options)
    own = {} if isinstance(task, str) else {"logits": task}
    return Segmentation(files, of_files, **own, **options)


def _answers(
    opening: Opening,
    source: Source,
    answering: dict[str, Any],
    count: int | None,
    seed: int,
    console: Console,
) -> Prepared:
    """Open a multimodal language model with its processor, and draw images with their questions."""
    from transformers import AutoProcessor

    from elip_models.calibration.answers import Answers, check_answering
    from elip_models.calibration.data import read_questions
    from elip_models.profiling.measure import device_named
    from elip_models.saving.meta_build import library_errors
    from elip_models.saving.open_model import open_model

    questions = read_questions(source.questions, source.images)
    of_images = sorted({question.images for question in questions})
    drawn = set(sample_files(of_images, count or LABELLED, seed))
    questions = [question for question in questions if question.images in drawn]
    with as_config_error("--device", inner="device"):
        device = device_named(opening.device)
    with console.status("opening the model"), as_config_error("MODEL", inner="spec"):
        model = open_model(opening.spec, pretrained=opening.pretrained, with_head=True)
    with as_config_error("MODEL", inner="model"):
        model = _dense(model, console).to(device)
        check_answering(model)
        name = model.config.name_or_path
        with library_errors(name, "a processor"):
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    task = Answers(questions, model=model, processor=processor, **answering)
    names = [row[0].images[0].relative_to(source.images).as_posix() for row in task.questions]
    return Prepared(task, model, names)


MAKERS: dict[str | None, Callable[..., Any]] = {
    "labels": _class_task,
    "captions": _retrieval,
    "masks": _segmentation,
    None: _feature_task,
}
"""Option with the data -> the function that makes a task of it."""


def _tokenizer(task: str, spec: str, model: "nn.Module") -> Any:
    """Return the tokenizer of an image-text model."""
    from elip_models.embedding.encoder import tokenizer_name
    from elip_models.towers import SelfReducingModel, as_image_text

    image_text = model if isinstance(model, SelfReducingModel) else as_image_text(model)
    if image_text is None:
        raise ConfigError(
            f"--task: expected {task} with an image-text model, got a {type(model).__name__}; pass "
            "another task"
        )
    with as_config_error("MODEL"):
        return image_text.load_tokenizer(tokenizer_name(spec))


def read_classes(labels: str, folder: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """Return the class of each image.

    Args:
        labels: the option.
        folder: of the images; names in a CSV file are relative to it.
        paths: the images.
    """
    if labels == FOLDERS:
        _check_no_empty_folder(paths)
        return {path: path.parent.name for path in paths}
    file = Path(labels)
    if not file.is_file():
        raise ConfigError(f"--labels: expected 'folders' or a CSV file, got {labels!r}")
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = {row[0]: row[1] for row in csv.reader(lines) if len(row) == 2}
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"--labels: expected a CSV file in UTF-8, got {labels}: {error}; save it as text"
        ) from error
    keys = {path: path.relative_to(folder).as_posix() for path in paths}
    missing = [key for key in keys.values() if not rows.get(key, "").strip()]
    if missing:
        raise ConfigError(
            f"--labels: expected a line image,label for each image in {labels}, got none for "
            f"{len(missing)} images, such as {shortened(missing[0])}; add the lines"
        )
    return {path: rows[key] for path, key in keys.items()}


def _check_no_empty_folder(paths: Sequence[Path]) -> None:
    """Raise ConfigError for an empty folder beside the folders of the classes."""
    for parent in sorted({path.parent.parent for path in paths}):
        for folder in sorted(parent.iterdir()):
            if folder.is_dir() and not any(folder.iterdir()):
                raise ConfigError(
                    f"--labels: expected images in the folder of each class, got none in {folder}; "
                    "add images, or remove the folder"
                )


def sample_by_class(classes: dict[Path, str], count: int | None, seed: int) -> list[Path]:
    """Return about `count` images, of each class its share and at least what a probe needs."""
    from elip_models.calibration.classes import FOLDS

    of_class = 2 * FOLDS
    members: dict[str, list[Path]] = {}
    for path, name in classes.items():
        members.setdefault(name, []).append(path)
    rarest = min(members, key=lambda name: len(members[name]))
    if len(members[rarest]) < of_class:
        raise ConfigError(
            f"--labels: expected at least {of_class} images of each class, got "
            f"{len(members[rarest])} of {shortened(rarest)}; add images, or remove the class"
        )
    least = of_class * len(members)
    if count is not None and count < least:
        raise ConfigError(
            f"--count: expected at least {least}, {of_class} for each of {len(members)} classes, "
            f"got {count}"
        )
    share = min(1, max(count or LABELLED, least) / len(classes))
    return sorted(
        path
        for paths in members.values()
        for path in sample_files(paths, max(of_class, round(share * len(paths))), seed)
    )
