"""Image folders as inputs of commands: the files, and their pixels as a model expects them."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from elip_models.validation import ConfigError, as_config_error, require_extra, shortened

with require_extra("elip_models.commands"):
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

if TYPE_CHECKING:
    from torch import Tensor, nn

    from elip_models.towers import ReducibleModel

Errors = type[Exception] | tuple[type[Exception], ...]


@contextmanager
def as_option_error(
    options: Mapping[str, str], *, errors: Errors = (TypeError, ValueError)
) -> Iterator[None]:
    """Turn an argument error of a function into a ConfigError that names the option."""
    try:
        yield
    except errors as error:
        name, colon, rest = str(error).partition(":")
        raise ConfigError(f"{options.get(name, name)}{colon}{rest}") from error


def image_files(folder: Path, *, least: int = 8) -> list[Path]:
    """Return the image files of a folder, with its subfolders, sorted by name."""
    from elip_models.images import IMAGE_ENDINGS

    if not folder.is_dir():
        raise ConfigError(f"IMAGES: expected a folder of images, got {shortened(str(folder))}")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if len(paths) < least:
        raise ConfigError(
            f"IMAGES: expected at least {least} image files ({', '.join(IMAGE_ENDINGS)}), got "
            f"{len(paths)} in {folder}"
        )
    return paths


def sample_files(paths: Sequence[Path], count: int, seed: int) -> list[Path]:
    """Return `count` of the files, drawn at random and sorted by name."""
    return sorted(random.Random(seed).sample(paths, min(count, len(paths))))


class ImageFiles(Sequence):
    """Images of files, (3, H, W) each, cropped and normalised for a model, read when indexed."""

    def __init__(self, paths: Sequence[Path], model: "ReducibleModel") -> None:
        import torch

        from elip_models.towers import as_tower

        self.paths = list(paths)
        self.size = as_tower(model.image_model).image_size
        self.stats = [torch.tensor(stat)[:, None, None] for stat in model.image_stats()]

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def __getitem__(self, i: int) -> "Tensor":
        """Read file i; SampleError if it cannot be read."""
        from elip_models.images import decode_image, pixels_of

        (mean, std), path = self.stats, self.paths[i]
        return (pixels_of(decode_image(path, str(path)), self.size) - mean) / std


def open_with_images(
    spec: str, paths: list[Path], console: Console, *, pretrained: bool
) -> "tuple[nn.Module, ImageFiles]":
    """Return the model that `spec` names, on the GPU if there is one, and the images for it."""
    import torch

    from elip_models.saving.open_model import open_model
    from elip_models.towers import as_reducible
    from elip_models.vlm.families import refuse_multimodal

    with console.status("opening the model"), as_config_error("MODEL", inner="spec"):
        model = open_model(spec, pretrained=pretrained)
    with as_config_error("MODEL", inner="model"):
        refuse_multimodal(model)
        files = ImageFiles(paths, as_reducible(model))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), files


def readable(files: ImageFiles, console: Console) -> "Iterator[tuple[Path, Tensor]]":
    """Yield each image that can be read; then print how many cannot.

    ConfigError is raised if none can be read.
    """
    from elip_models.images import SampleError

    unreadable = []
    for i in track(range(len(files)), "reading images", console=console, transient=True):
        try:
            yield files.paths[i], files[i]
        except SampleError as error:
            unreadable.append(str(error))
    if unreadable:
        console.print(
            escape(f"{len(unreadable)} of {len(files)} images were not read: {unreadable[0]}")
        )
    if len(unreadable) == len(files):
        raise ConfigError("IMAGES: expected readable images, got none")
