"""How a model expects its images, as its library describes it: crop, size, mean and deviation."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from PIL import Image
from torch import Tensor, nn

from elip_models.images import CLIP_STATS, IMAGENET_STATS
from elip_models.pretraining.data import image_transform
from elip_models.saving.files import read_object
from elip_models.towers import SelfReducingModel, as_image_text, as_tower, library_of
from elip_models.validation import Bounds, ConfigError, PositiveShare, as_config_error, check

STATS = {"imagenet": IMAGENET_STATS, "clip": CLIP_STATS}
Numbers = tuple[float, float, float]
KEYS: dict[str, Any] = {
    "size": Annotated[int, Bounds(1, 2**14)],
    "crop": PositiveShare,
    "interpolation": Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"],
    "mean": Numbers,
    "std": Numbers,
}
"""Keys of a JSON file, and their types."""


class Preprocessing(NamedTuple):
    """A function from an RGB image to a tensor (3, H, W), and its settings as plain data."""

    transform: Callable[[Image.Image], Tensor]
    described: dict[str, Any]


def preprocessing_of(
    model: nn.Module, settings: str | Path | dict[str, Any] | None = None
) -> Preprocessing:
    """Return how the model expects its images, or what the settings describe.

    Args:
        model: the whole model.
        settings: 'imagenet' or 'clip', for a resized and cropped image with these statistics; a
            JSON file; or what such a preprocessing has in `described`. None: the model's own.

    Raises:
        ConfigError: the model's files have no preprocessing, or the settings are malformed.
    """
    if settings is not None:
        with as_config_error("preprocess"):
            return _of_settings(model, settings)
    if isinstance(model, SelfReducingModel):
        size, resize = model.config.image_size, model.config.resize
        mean, std = model.image_stats()
        transform = image_transform(size, train=False, resize=resize, mean=mean, std=std)
        described = {"size": size, "resize": resize, "mean": list(mean), "std": list(std)}
        return Preprocessing(transform, {"kind": "elip_models"} | described)
    readers = {"timm": _of_timm, "open_clip": _of_open_clip, "transformers": _of_transformers}
    reader = readers.get(library_of(model))
    preprocessing = None if reader is None else reader(model)
    if preprocessing is None:
        raise ConfigError(
            f"model: expected one whose files describe its preprocessing, got none with a "
            f"{type(model).__name__}; pass preprocess='imagenet', 'clip' or a JSON file"
        )
    return preprocessing


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

    settings = open_clip.get_model_preprocess_cfg(model)
    if not settings or "mean" not in settings:
        return None
    config = PreprocessCfg(**settings)
    transform = image_transform_v2(config, is_train=False)
    return Preprocessing(transform, {"kind": "open_clip"} | _plain(asdict(config)))


def _processed(processor: Any, image: Image.Image) -> Tensor:
    """Return the pixels (3, H, W) of an image by an image processor of transformers."""
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


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
    return Preprocessing(partial(_processed, processor), described)


def _of_settings(model: nn.Module, settings: str | Path | dict[str, Any]) -> Preprocessing:
    from timm.data import create_transform

    if isinstance(settings, dict):
        chosen = {key: value for key, value in settings.items() if key != "kind"}
    else:
        chosen = {"interpolation": "bicubic", "crop_pct": 1.0}
        chosen |= _named(str(settings))
        chosen.setdefault("input_size", (3, *_image_size(model)))
    chosen = {
        key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()
    }
    return Preprocessing(create_transform(**chosen), {"kind": "given"} | _plain(chosen))


def _named(name: str) -> dict[str, Any]:
    """Return the settings of timm that 'imagenet', 'clip' or a JSON file describes."""
    if name in STATS:
        return dict(zip(("mean", "std"), STATS[name], strict=True))
    if not name.endswith(".json"):
        raise ValueError(
            f"expected {', '.join(map(repr, STATS))} or a JSON file, got {name!r:.200}"
        )
    content = read_object(Path(name))
    if content.keys() - KEYS.keys() or not {"mean", "std"} <= content.keys():
        raise ValueError(
            f"expected {', '.join(sorted(KEYS))}, at least mean and std, got {', '.join(content)}"
        )
    for key, value in content.items():
        check(key, tuple(value) if isinstance(value, list) else value, KEYS[key])
    names = {"crop": "crop_pct", "size": "input_size"}
    content |= {"size": [3, content["size"], content["size"]]} if "size" in content else {}
    return {names.get(key, key): value for key, value in content.items()}


def _image_size(model: nn.Module) -> tuple[int, int]:
    if isinstance(model, SelfReducingModel):
        return model.config.image_size, model.config.image_size
    whole = as_image_text(model)
    return as_tower(model if whole is None else whole.image_model).image_size


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as JSON has them."""
    return json.loads(json.dumps(settings, default=str))
