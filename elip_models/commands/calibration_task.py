"""The task of `elip calibrate` from its options: which one, and on which images."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from elip_models.commands.image_folder import image_files, open_with_images, readable, sample_files
from elip_models.validation import ConfigError, require_extra, shortened

with require_extra("elip_models.commands"):
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from torch import nn

    from elip_models.calibration.task import Task
    from elip_models.commands.image_folder import ImageFiles

FOLDERS = "folders"
CLASS_TASKS = ("head", "zero-shot", "probe", "own-probe")
FEATURE_TASKS = ("cosine", "neighbours")
TASKS = (*CLASS_TASKS, *FEATURE_TASKS)
UNLABELLED, LABELLED = 200, 2000
"""Images by default."""
KEPT_BYTES = 2**31  # of images in memory
Loss = Callable[..., Any]


class Prepared(NamedTuple):
    """A task, the dense model that it judges, and the file name of each image."""

    task: "Task"
    model: "nn.Module"
    names: list[str]


def prepare(
    spec: str,
    folder: Path,
    task: str | Loss | None,
    *,
    labels: str | None,
    count: int | None,
    seed: int,
    batch_size: int,
    opening: dict[str, Any],
    console: Console,
) -> Prepared:
    """Open the model, choose the task and read its images.

    Args:
        spec: of the model.
        folder: of the images.
        task: a name of `TASKS`, a function of the user, or None for the one that model and data
            leave.
        labels: 'folders', a CSV file, or None.
        count: of the images; None for the default of the task.
        seed: of the draw of images.
        batch_size: images in a batch.
        opening: the options `pretrained` and `device` of `open_with_images`.
        console: where the choice is printed.

    Raises:
        ConfigError: an option that does not fit the model or the data.
    """
    if labels is None and task in CLASS_TASKS:
        labels = FOLDERS
    if labels is not None and task is not None and task not in CLASS_TASKS:
        raise ConfigError(
            f"--labels: expected none with --task {shortened(task)}, which reads no classes, got "
            f"{shortened(labels)}"
        )
    paths = image_files(folder)
    classes = None if labels is None else read_classes(labels, folder, paths)
    opening = opening | {"kept_bytes": KEPT_BYTES}
    has_head = task == "head" or (task is None and classes is not None)
    model, files = open_with_images(spec, paths, console, with_head=has_head, **opening)
    model = _dense(model, console)
    if task is None:
        task, reason = chosen_task(model, classes)
        console.print(escape(f"task: {task}, {reason}"), soft_wrap=True, highlight=False)
        if has_head and task != "head":
            model, files = open_with_images(spec, paths, Console(quiet=True), **opening)
            model = _dense(model, console)
    sampled = sample_files(paths, count or (UNLABELLED if classes is None else LABELLED), seed)
    if task in ("probe", "own-probe"):
        sampled = sample_by_class(classes, count, seed)
    files.paths = sampled
    files.paths = [path for path, _ in readable(files, console)]
    names = [path.relative_to(folder).as_posix() for path in files.paths]
    of_files = None if classes is None else [classes[path] for path in files.paths]
    return Prepared(_task(task, spec, model, files, of_files, batch_size), model, names)


def _dense(model: "nn.Module", console: Console) -> "nn.Module":
    from elip_models.api import is_reduced, unreduce_

    if is_reduced(model):
        unreduce_(model)
        console.print("MODEL is reduced: its dense model is calibrated", highlight=False)
    return model


def chosen_task(model: "nn.Module", classes: dict[Path, str] | None) -> tuple[str, str]:
    """Return the task that the model and the data leave, and why, in words."""
    from elip_models.calibration.class_names import head_classes, known_labels
    from elip_models.towers import as_image_text

    if classes is None:
        return "cosine", "since there are no labels"
    labels = sorted(set(classes.values()))
    head = head_classes(model)
    if head is not None and known_labels(labels, head):
        return "head", f"since the model's head has {len(head)} classes, those of the labels too"
    if as_image_text(model) is not None and not all(label.isdecimal() for label in labels):
        return "zero-shot", "since the model compares images with the names of the classes"
    other = "the labels are no classes of the model's head" if head else "the model has no head"
    return "probe", f"since {other}"


def _task(
    task: str | Loss,
    spec: str,
    model: "nn.Module",
    files: "ImageFiles",
    labels: Sequence[str] | None,
    batch_size: int,
) -> "Task":
    """Return the task of a name, or of a function of the user."""
    import torch

    from elip_models.analysis.model_features import image_features
    from elip_models.calibration import class_names, classes, features
    from elip_models.embedding.encoder import tokenizer_name
    from elip_models.towers import as_image_text

    options: dict[str, Any] = {"batch_size": batch_size}
    if labels is None:
        options["features"], _ = image_features(model)
        if not isinstance(task, str):
            return features.OwnLoss(files, loss=task, **options)
        kind = features.Neighbours if task == "neighbours" else features.Cosine
        return kind(files, **options)
    named = sorted(set(labels))
    if task == "head":
        head = class_names.head_classes(model)
        if head is None:
            raise ConfigError(
                f"--task: expected head with a classifier, got a {type(model).__name__} without "
                "one; pass --task probe"
            )
        number_of = class_names.class_numbers(named, head)
        options["classes"] = [(*names, str(i))[0] for i, names in enumerate(head)]
    else:
        number_of = {name: i for i, name in enumerate(named)}
        options["classes"] = named
    numbers = torch.tensor([number_of[label] for label in labels])
    if task == "head":
        return classes.Head(files, numbers, **options)
    if task == "zero-shot":
        options["classes"] = class_names.names_in_texts(named)
        image_text = as_image_text(model)
        if image_text is None:
            raise ConfigError(
                "--task: expected zero-shot with an image-text model, got a "
                f"{type(model).__name__}; pass --task probe"
            )
        tokenizer = image_text.load_tokenizer(tokenizer_name(spec))
        return classes.ZeroShot(files, numbers, model=model, tokenizer=tokenizer, **options)
    options["features"], _ = image_features(model)
    return classes.Probe(files, numbers, own=task == "own-probe", **options)


def read_classes(labels: str, folder: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """Return the class of each image.

    Args:
        labels: the option.
        folder: of the images; names in a CSV file are relative to it.
        paths: the images.
    """
    if labels == FOLDERS:
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
    missing = [key for key in keys.values() if key not in rows]
    if missing:
        raise ConfigError(
            f"--labels: expected a line image,label for each image in {labels}, got none for "
            f"{len(missing)} images, such as {shortened(missing[0])}; add the lines"
        )
    return {path: rows[key] for path, key in keys.items()}


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
