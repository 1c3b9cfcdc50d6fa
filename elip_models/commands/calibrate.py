"""The command `elip calibrate`: the cheapest reduction that changes a model's features little."""

from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from elip_models.commands.image_folder import (
    as_option_error,
    image_paths,
    open_with_images,
    readable,
)
from elip_models.validation import ConfigError, check_output, require_extra, shortened

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from elip_models.analysis.calibration import Calibration

OPTIONS = {"model": "MODEL", "images": "IMAGES", "tolerance": "--tolerance", "metric": "--metric"}
"""Argument of `elip_models.calibrate` -> that of the command."""


def calibrate(
    model: Annotated[
        str, typer.Argument(help="timm:NAME, open_clip:NAME:TAG, hf:NAME or folder of a model.")
    ],
    images: Annotated[Path, typer.Argument(help="Folder of images, searched with its subfolders.")],
    tolerance: Annotated[
        float, typer.Option(help="Largest mean loss: of cosine, or of neighbours kept.")
    ] = 0.01,
    metric: Annotated[
        str, typer.Option(help="Loss: cosine, neighbours, or FILE.py:function of your own.")
    ] = "cosine",
    count: Annotated[
        int, typer.Option(min=8, help="Number of images, drawn at random from the folder.")
    ] = 100,
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
    paths = image_paths(images, count, seed)
    import torch

    from elip_models.analysis import calibrate as analysis
    from elip_models.towers import as_reducible

    console = Console(stderr=True)
    opened, files = open_with_images(model, paths, console, pretrained=pretrained)
    device = next(opened.parameters()).device
    pixels = torch.stack([image for _, image in readable(files, console)]).to(device)
    with console.status("dense features") as status, as_option_error(OPTIONS):
        calibration = analysis.calibrate(
            as_reducible(opened).image_model,
            pixels,
            tolerance=tolerance,
            metric=chosen_metric,
            class_token_only=class_token_only,
            batch_size=batch_size,
            every=every,
            progress=status.update,
        )
    _report(calibration, output)


def _report(calibration: "Calibration", output: Path) -> None:
    """Print the table and the choice; write them and a chart, if there is a choice."""
    Console().print(escape(str(calibration)), soft_wrap=True, highlight=False)
    if calibration.chosen is None:
        return
    calibration.save(output)
    lines = [f'{output}: call elip_models.reduce_(model, "{output}")']
    if find_spec("matplotlib") is None:
        lines.append("no chart, which needs matplotlib: pip install matplotlib")
    else:
        from elip_models.analysis.calibration_chart import draw_calibration

        lines.append(str(draw_calibration(calibration, output.with_suffix(".png"))))
    Console().print(escape("\n".join(lines)), soft_wrap=True, highlight=False)


def _metric(text: str) -> str | Callable[..., Any]:
    """Return the metric that FILE.py:function names, or the text itself."""
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
