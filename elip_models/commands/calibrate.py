"""The command `elip calibrate`: the cheapest reduction that changes a model's features little."""

import csv
from collections.abc import Callable, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from elip_models.commands.image_folder import (
    as_option_error,
    image_files,
    open_with_images,
    readable,
    sample_files,
)
from elip_models.validation import ConfigError, check_output, require_extra, shortened

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from elip_models.analysis.calibration import Calibration

FOLDERS = "folders"
UNLABELLED, LABELLED = 100, 1000
"""Images by default."""
ADVICE = (
    "The cosine and the neighbours of features describe a change; they do not tell what a task "
    "loses. If your images have classes, --labels judges by a task."
)


def calibrate(
    model: Annotated[
        str, typer.Argument(help="timm:NAME, open_clip:NAME:TAG, hf:NAME or folder of a model.")
    ],
    images: Annotated[Path, typer.Argument(help="Folder of images, searched with its subfolders.")],
    labels: Annotated[
        str | None,
        typer.Option(
            help="Judge by top-1 of a linear probe: 'folders' if each class has a folder, or a CSV "
            "file of lines image,label."
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest mean loss: 0.01 is one point of top-1, or of the metric.")
    ] = 0.01,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Without labels: cosine (default), neighbours, or FILE.py:function of your own."
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Images, drawn at random: by default 100, or 1,000 with labels, and at least 5 of "
            "each class.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, max=2**16, help="Images in a batch, for features and times.")
    ] = 8,
    class_token_only: Annotated[
        bool,
        typer.Option(
            "--class-token-only",
            help="You use no patch features: the last block computes the class token alone.",
        ),
    ] = False,
    every: Annotated[
        bool, typer.Option("--every", help="Try every strategy at every cost, without the search.")
    ] = False,
    output: Annotated[Path, typer.Option(help="JSON file for the choice and the table.")] = Path(
        "calibrated.json"
    ),
    pretrained: Annotated[bool, typer.Option(help="Load the model's weights.")] = True,
) -> None:
    """Find the cheapest reduction that changes a model's features of your images little."""
    check_output("--output", output)
    if output.suffix != ".json":
        raise ConfigError(f"--output: expected a name ending in .json, got {output}")
    chosen_metric = _metric(metric)
    paths = image_files(images)
    classes = None if labels is None else _classes(labels, images, paths)
    if classes is None:
        paths = sample_files(paths, count or UNLABELLED, seed)
    else:
        paths = _sample_by_class(classes, count, seed)
    import torch

    from elip_models.analysis import calibrate as analysis
    from elip_models.api import is_reduced, unreduce_
    from elip_models.towers import as_reducible

    console = Console(stderr=True)
    opened, files = open_with_images(model, paths, console, pretrained=pretrained)
    if is_reduced(opened):
        unreduce_(opened)
        console.print("MODEL is reduced: its dense model is calibrated", highlight=False)
    device = next(opened.parameters()).device
    read, decoded = zip(*readable(files, console), strict=True)
    pixels = torch.stack(decoded).to(device)
    numbers = None
    if classes is not None:
        number_of = {name: i for i, name in enumerate(sorted({classes[path] for path in read}))}
        numbers = torch.tensor([number_of[classes[path]] for path in read])
    with console.status("dense features") as status, as_option_error(calibrate):
        calibration = analysis.calibrate(
            as_reducible(opened).image_model,
            pixels,
            labels=numbers,
            tolerance=tolerance,
            metric=chosen_metric,
            class_token_only=class_token_only,
            batch_size=batch_size,
            every=every,
            progress=status.update,
        )
    if labels is None:
        console.print(ADVICE, soft_wrap=True, highlight=False)
    _report(calibration, output)


def _classes(labels: str, folder: Path, paths: Sequence[Path]) -> dict[Path, str]:
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


def _sample_by_class(classes: dict[Path, str], count: int | None, seed: int) -> list[Path]:
    """Return about `count` images, of each class its share, and at least as many as folds."""
    from elip_models.analysis.probe import FOLDS

    members: dict[str, list[Path]] = {}
    for path, name in classes.items():
        members.setdefault(name, []).append(path)
    rarest = min(members, key=lambda name: len(members[name]))
    if len(members[rarest]) < FOLDS:
        raise ConfigError(
            f"--labels: expected at least {FOLDS} images of each class, got "
            f"{len(members[rarest])} of {shortened(rarest)}; add images, or remove the class"
        )
    least = FOLDS * len(members)
    if count is not None and count < least:
        raise ConfigError(
            f"--count: expected at least {least}, {FOLDS} for each of {len(members)} classes, got "
            f"{count}"
        )
    share = min(1, max(count or LABELLED, least) / len(classes))
    return sorted(
        path
        for paths in members.values()
        for path in sample_files(paths, max(FOLDS, round(share * len(paths))), seed)
    )


def _report(calibration: "Calibration", output: Path) -> None:
    """Print the table and the choice; write them and a chart, or exit with 1 without a choice."""
    Console().print(escape(str(calibration)), soft_wrap=True, highlight=False)
    if calibration.chosen is None:
        there = "; the file that is there is from an earlier run" if output.exists() else ""
        error = f"error: {output} was not written, since no setting is within the tolerance{there}"
        Console(stderr=True).print(escape(error), soft_wrap=True, highlight=False)
        raise typer.Exit(1)
    calibration.save(output)
    lines = [f'{output}: call elip_models.reduce_(model, "{output}")']
    if find_spec("matplotlib") is None:
        lines.append("no chart, which needs matplotlib: pip install matplotlib")
    else:
        from elip_models.analysis.calibration_chart import draw_calibration

        lines.append(str(draw_calibration(calibration, output.with_suffix(".png"))))
    Console().print(escape("\n".join(lines)), soft_wrap=True, highlight=False)


def _metric(text: str | None) -> str | Callable[..., Any] | None:
    """Return the metric that FILE.py:function names, or the text itself."""
    if text is None:
        return None
    file, colon, name = text.rpartition(":")
    if not colon:
        return text
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(
            f"--metric: expected FILE.py:function with a Python file, got {shortened(text)}"
        )
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"--metric: expected a function in {path}, got none named {name!r}")
    return function
