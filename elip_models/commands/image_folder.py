"""Image folders as inputs of commands: the files, and their pixels as a model expects them."""

import inspect
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from elip_models.validation import ConfigError, as_config_error, require_extra, shortened

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    Transform = Callable[[Image], Tensor]

TRIAL_SIZES = ((256, 256), (320, 240))
"""A preprocessing to one size gives that size for images of both."""
POOLER = "pooler"
Errors = type[Exception] | tuple[type[Exception], ...]


@contextmanager
def as_option_error(
    command: Callable[..., None], *, errors: Errors = (TypeError, ValueError), **others: str
) -> Iterator[None]:
    """Turn an argument error of a function into a ConfigError that names the command's option.

    An argument is the option of the same name, or that of `others`.
    """
    try:
        yield
    except errors as error:
        name, colon, rest = str(error).partition(":")
        option = others.get(name) or _option_of(command, name)
        raise ConfigError(f"{option}{colon}{rest}") from error


def _option_of(command: Callable[..., None], name: str) -> str:
    """Return "--batch-size" or "IMAGES" for a parameter of a command; other names as they are."""
    parameter = inspect.signature(command).parameters.get(name)
    if parameter is None:
        return name
    (info,) = parameter.annotation.__metadata__
    is_argument = isinstance(info, typer.models.ArgumentInfo)
    return name.upper() if is_argument else f"--{name.replace('_', '-')}"


@contextmanager
def listing(source: str) -> Iterator[None]:
    """Show at once, on stderr, that a command lists a folder, which takes long for a whole disk.

    Options may follow the folder, behind a comma.
    """
    folder = source.partition(",")[0]
    if not os.path.isdir(folder):
        yield
        return
    console, text = Console(stderr=True), escape(f"listing the images in {folder}")
    if not console.is_terminal:
        console.print(text, soft_wrap=True, highlight=False)
    with console.status(text):
        yield


def image_files(folder: Path, *, least: int = 8) -> list[Path]:
    """Return the image files of a folder, with its subfolders, sorted by name."""
    from elip_models.images import IMAGE_ENDINGS

    if not folder.is_dir():
        raise ConfigError(f"IMAGES: expected a folder of images, got {shortened(str(folder))}")
    with listing(str(folder)):
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
    if len(paths) < least:
        raise ConfigError(
            f"IMAGES: expected at least {least} image files ({', '.join(IMAGE_ENDINGS)}), got "
            f"{len(paths)} in {folder}; add images"
        )
    return paths


def sample_files(paths: Sequence[Path], count: int, seed: int) -> list[Path]:
    """Return `count` of the files, drawn at random and sorted by name."""
    return sorted(random.Random(seed).sample(paths, min(count, len(paths))))


class ImageFiles(Sequence):
    """Images of files, (3, H, W) each, as a model expects them, read when indexed.

    Args:
        paths: the files.
        transform: the preprocessing.
        kept_bytes: of images that stay in memory once they are read.
    """

    def __init__(
        self, paths: Sequence[Path], transform: "Transform", *, kept_bytes: int = 0
    ) -> None:
        self.paths = list(paths)
        self.transform, self.kept_bytes = transform, kept_bytes
        self._kept: dict[Path, Tensor] = {}

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.paths)

    def __getitem__(self, i: int) -> "Tensor":
        """Read file i; SampleError if it cannot be read."""
        from elip_models.images import SampleError, decode_image

        path = self.paths[i]
        if path in self._kept:
            return self._kept[path]
        image = decode_image(path, str(path))
        try:
            pixels = self.transform(image)
        except Exception as error:  # libraries raise any error for an image of an odd shape
            raise SampleError(str(path), f"cannot be preprocessed: {error!s:.300}") from error
        if pixels.nbytes <= self.kept_bytes:
            self._kept[path] = pixels
            self.kept_bytes -= pixels.nbytes
        return pixels


def _transform(model: "nn.Module") -> "tuple[Transform, str]":
    """Return the preprocessing that `elip embed` uses too, and its size in words.

    A model without one, or whose own has not the size of the tower, gets a crop to that size.
    """
    import torch
    from PIL import Image

    from elip_models.embedding.preprocessing import preprocessing_of
    from elip_models.images import pixels_of
    from elip_models.towers import as_reducible, as_tower

    reducible = as_reducible(model)
    tower = as_tower(reducible.image_model)
    size = tower.image_size
    try:
        own = preprocessing_of(model)
        shapes = {tuple(own.transform(Image.new("RGB", side)).shape) for side in TRIAL_SIZES}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # or ConfigError
        shapes = set()
    shape = shapes.pop() if len(shapes) == 1 else ()
    if len(shape) == 3 and (tower.has_dynamic_size or shape[1:] == size):
        words = f"by the model's own preprocessing ({own.described['kind']})"
        return own.transform, f"{shape[1]} x {shape[2]} pixels, {words}"
    mean, std = (torch.tensor(stat)[:, None, None] for stat in reducible.image_stats())
    words = f"{size[0]} x {size[1]} pixels, cropped at the centre to the size of the model"
    return (lambda image: (pixels_of(image, size) - mean) / std), words


def open_with_images(
    spec: str,
    paths: list[Path],
    console: Console,
    *,
    pretrained: bool,
    with_head: bool = False,
    kept_bytes: int = 0,
    device: str | None = None,
) -> "tuple[nn.Module, ImageFiles]":
    """Return the model that `spec` names, on a device of `device_named`, and the images for it.

    A model whose pooler has no weights gets none: its feature is the class token. `with_head` is
    that of `open_model`, `kept_bytes` that of `ImageFiles`.
    """
    from elip_models.embedding.encoder import open_embedding_model
    from elip_models.profiling.measure import device_named
    from elip_models.vlm.families import refuse_multimodal

    with as_config_error("--device", inner="device"):
        place = device_named(device)
    with console.status("opening the model"), as_config_error("MODEL", inner="model"):
        model, new_parts = open_embedding_model(spec, pretrained, with_head=with_head)
    if set(new_parts) - {POOLER}:
        raise ConfigError(
            f"MODEL: expected weights for all parts, got none for {', '.join(new_parts)} in "
            f"{spec}; add them to its files"
        )
    if new_parts:  # as transformers makes the model by add_pooling_layer=False
        setattr(model, POOLER, None)
    with as_config_error("MODEL", inner="model"):
        refuse_multimodal(model)
        transform, size = _transform(model)
    console.print(escape(f"images are read at {size}"), soft_wrap=True, highlight=False)
    files = ImageFiles(paths, transform, kept_bytes=kept_bytes)
    return model.to(place), files


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
