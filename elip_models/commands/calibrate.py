"""The command `elip calibrate`: the cheapest reduction that changes a model's features little."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from elip_models.validation import (
    ConfigError,
    as_config_error,
    check_output,
    require_extra,
    shortened,
)

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

if TYPE_CHECKING:
    from torch import Tensor, nn

    from elip_models.analysis.calibration import Calibration
    from elip_models.towers import ReducibleModel

OPTIONS = {"model": "MODEL", "images": "IMAGES", "tolerance": "--tolerance", "metric": "--metric"}
"""Argument of `elip_models.calibrate` -> that of the command."""
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def calibrate(
    model: Annotated[
        str, typer.Argument(help="timm:NAME, open_clip:NAME/TAG, hf:NAME or folder of a model.")
    ],
    images: Annotated[Path, typer.Argument(help="Folder of images, searched with its subfolders.")],
    tolerance: Annotated[
        float, typer.Option(help="Largest mean loss: of cosine, or of nearest neighbours.")
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
    paths = _paths(images, count, seed)
    from elip_models.analysis import calibrate as analysis

    console = Console(stderr=True)
    opened, pixels = _inputs(model, paths, console, pretrained=pretrained)
    with console.status("dense features") as status, _as_option_error():
        found = analysis.calibrate(
            opened,
            pixels,
            tolerance=tolerance,
            metric=chosen_metric,
            class_token_only=class_token_only,
            batch_size=batch_size,
            every=every,
            progress=status.update,
        )
    _report(found, output)


def _inputs(
    spec: str, paths: list[Path], console: Console, *, pretrained: bool
) -> "tuple[nn.Module, Tensor]":
    """Return the image model that `spec` names, and its images; on the GPU if there is one."""
    import torch

    from elip_models.models.io.open_model import open_model
    from elip_models.towers import as_reducible

    with console.status("opening the model"), as_config_error("MODEL"):
        model = as_reducible(open_model(spec, pretrained=pretrained))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.image_model.to(device), _read(paths, model, console).to(device)


def _report(found: "Calibration", output: Path) -> None:
    """Print the table and the choice; write them and a chart, if there is a choice."""
    Console().print(escape(str(found)), soft_wrap=True, highlight=False)
    if found.chosen is None:
        return
    found.save(output)
    lines = [f'{output}: call elip_models.reduce_(model, "{output}")']
    if find_spec("matplotlib") is None:
        lines.append("no chart, which needs matplotlib: pip install matplotlib")
    else:
        from elip_models.analysis.calibration_chart import draw_calibration

        lines.append(str(draw_calibration(found, output.with_suffix(".png"))))
    Console().print(escape("\n".join(lines)), soft_wrap=True, highlight=False)


@contextmanager
def _as_option_error() -> Iterator[None]:
    """Turn an argument error of `calibrate` into a ConfigError that names the option."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        raise ConfigError(f"{OPTIONS.get(name, name)}{colon}{rest}") from error


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


def _paths(folder: Path, count: int, seed: int) -> list[Path]:
    """Return `count` image files of a folder, drawn at random and sorted by name."""
    if not folder.is_dir():
        raise ConfigError(f"IMAGES: expected a folder of images, got {shortened(str(folder))}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if len(found) < 8:
        raise ConfigError(
            f"IMAGES: expected at least 8 image files ({', '.join(ENDINGS)}), got {len(found)} "
            f"in {folder}"
        )
    return sorted(random.Random(seed).sample(found, min(count, len(found))))


def _read(paths: list[Path], model: "ReducibleModel", console: Console) -> "Tensor":
    """Return the images, cropped and normalised for the model; tell how many are unreadable."""
    import torch

    from elip_models.analysis.visualize_inputs import pixels_of
    from elip_models.data.sample import SampleError, decode_image
    from elip_models.towers import as_tower

    size = as_tower(model.image_model).image_size
    mean, std = (torch.tensor(each)[:, None, None] for each in model.image_stats())
    read, unreadable = [], []
    for path in track(paths, "reading images", console=console, transient=True):
        try:
            read.append((pixels_of(decode_image(path, str(path)), size) - mean) / std)
        except SampleError as error:
            unreadable.append(str(error))
    if unreadable:
        console.print(
            escape(f"{len(unreadable)} of {len(paths)} images were not read: {unreadable[0]}")
        )
    if not read:
        raise ConfigError("IMAGES: expected readable images, got none")
    return torch.stack(read)
