"""How a model expects its images, as its library describes it: crop, size, mean and deviation."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from elip_models.images import CLIP_STATS, IMAGENET_STATS
from elip_models.pretraining.data import image_transform
from elip_models.saving.files import read_object
from elip_models.towers import SelfReducingModel, as_tower, library_of
from elip_models.validation import Bounds, ConfigError, PositiveShare, as_config_error, check

STATS = {"imagenet": IMAGENET_STATS, "clip": CLIP_STATS}
Size = Annotated[int, Bounds(1, 2**14)]
Numbers = tuple[float, float, float]
KEYS = {
    "size": Size,
    "crop": PositiveShare,
    "interpolation": str,
    "mean": Numbers,
    "std": Numbers,
}
"""Keys of a JSON file, and their types."""


class Preprocessing(NamedTuple):
    """A function from an RGB image to a tensor (3, H, W), and its settings as plain data."""

    transform: Callable[[Image.Image], Tensor]
    described: dict[str, Any]


def preprocessing_of(model: nn.Module, given: str | Path | None = None) -> Preprocessing:
    """Return how the model expects its images, or what `given` describes.

    Args:
        model: the whole model.
        given: 'imagenet' or 'clip', for a resized and cropped image with these statistics; or a
            JSON file. None: the model's own.

    Raises:
        ConfigError: the model's files have no preprocessing, or `given` is malformed.
    """
    if given is not None:
        return _given(model, str(given))
    if isinstance(model, SelfReducingModel):
        size, resize = model.config.image_size, model.config.resize
        mean, std = model.image_stats()
        settings = {"size": size, "resize": resize, "mean": list(mean), "std": list(std)}
        transform = image_transform(size, train=False, resize=resize, mean=mean, std=std)
        return Preprocessing(transform, {"kind": "elip_models"} | settings)
    readers = {"timm": _of_timm, "open_clip": _of_open_clip, "transformers": _of_transformers}
    reader = readers.get(library_of(model))
    found = None if reader is None else reader(model)
    if found is None:
        raise ConfigError(
            f"model: expected one whose files describe its preprocessing, got none with a "
            f"{type(model).__name__}; pass preprocess='imagenet', 'clip' or a JSON file"
        )
    return found


def _of_timm(model: nn.Module) -> Preprocessing | None:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("mean"):
        return None
    from timm.data import create_transform, resolve_data_config

    settings = resolve_data_config(model=model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:  # img_size=, which changes no config
        settings["input_size"] = (3, *size)
    return Preprocessing(create_transform(**settings), {"kind": "timm"} | _plain(settings))


def _of_open_clip(model: nn.Module) -> Preprocessing | None:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    found = open_clip.get_model_preprocess_cfg(model)
    if not found or "mean" not in found:
        return None
    config = PreprocessCfg(**found)
    transform = image_transform_v2(config, is_train=False)
    return Preprocessing(transform, {"kind": "open_clip"} | _plain(asdict(config)))


class _Processor:
    """An image processor of transformers as a function of one image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """Return pixels (3, H, W)."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def _of_transformers(model: nn.Module) -> Preprocessing | None:
    from transformers import AutoImageProcessor

    from elip_models.saving.meta_build import library_errors

    name = model.config.name_or_path
    if not name:
        return None
    try:
        with library_errors(name, "an image processor"):
            processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    settings = {key: value for key, value in processor.to_dict().items() if key[0] != "_"}
    described = {"kind": "transformers", "class": type(processor).__name__} | _plain(settings)
    return Preprocessing(_Processor(processor), described)


def _plain(value: Any) -> Any:
    """Return settings as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _given(model: nn.Module, given: str) -> Preprocessing:
    from timm.data import create_transform

    height, width = _image_size(model)
    settings = {"input_size": (3, height, width), "interpolation": "bicubic", "crop_pct": 1.0}
    if given in STATS:
        mean, std = STATS[given]
        settings |= {"mean": tuple(mean), "std": tuple(std)}
    else:
        settings |= _from_file(given)
    with as_config_error("preprocess"):
        transform = create_transform(**settings)
    return Preprocessing(transform, {"kind": "given"} | _plain(settings))


def _image_size(model: nn.Module) -> tuple[int, int]:
    from elip_models.towers import as_image_text

    if isinstance(model, SelfReducingModel):
        return model.config.image_size, model.config.image_size
    with as_config_error("preprocess"):
        whole = as_image_text(model)
        return as_tower(model if whole is None else whole.image_model).image_size


def _from_file(given: str) -> dict[str, Any]:
    """Return the settings of timm that a JSON file describes."""
    path = Path(given)
    if path.suffix != ".json":
        raise ConfigError(
            f"preprocess: expected {', '.join(map(repr, STATS))} or a JSON file, got {given!r:.200}"
        )
    with as_config_error("preprocess"):
        content = read_object(path)
        if content.keys() - KEYS.keys() or not {"mean", "std"} <= content.keys():
            raise ValueError(
                f"expected {', '.join(KEYS)}, at least mean and std, got {', '.join(content)}"
            )
        content = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        for name, value in content.items():
            check(name, value, KEYS[name])
    names = {"crop": "crop_pct", "size": "input_size"}
    content |= {"size": (3, content["size"], content["size"])} if "size" in content else {}
    return {names.get(name, name): value for name, value in content.items()}


def check_pixels(pixels: Any) -> Tensor:
    """Return the pixels of an image; raise TypeError if a transform returned something else."""
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 3:
        got = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise TypeError(f"preprocess: expected a tensor (3, H, W) of an image, got {got}")
    return pixels
