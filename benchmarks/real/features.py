"""Class-token features of photographs under a setting, stored so that a run can be continued.

A setting is a strategy as `reduce_` takes it, and `keep`: 'tome 0.5', 'evit:merge=nearest 0.7', or
'tome:r=16' alone. The path of a folder of `save_reduced` is a reduced model that was trained; its
results have the name of the folder.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import elip_models
from benchmarks.real.dinov2 import batches
from elip_models.saving.files import tensors_sha256, write_tensors
from elip_models.strategies.summary import Summary

DENSE = "dense"


class Setting(NamedTuple):
    """A setting as it was written, and the reduced model.

    weights: the digest of the weights of a trained model; empty for those of DINOv2.
    """

    text: str
    model: nn.Module
    summary: Summary
    weights: str = ""


def read_settings(text: str, model: nn.Module) -> list[Setting]:
    """Return dense and the settings of a line, if any; a comma and a space separate them.

    Raises:
        ValueError, TypeError: what `reduce_` raises, or two settings of the same name.
    """
    dense = Setting(DENSE, model, elip_models.reduction_summary(model))
    parts = text.split(", ") if text else []
    settings = [dense, *(_read_setting(part.strip(), model) for part in parts)]
    names = [setting.text for setting in settings]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"settings: expected different names, got {min(repeated)!r} twice")
    return settings


def _read_setting(text: str, model: nn.Module) -> Setting:
    if Path(text).is_dir():
        trained = elip_models.load_reduced(text).eval().to(next(model.parameters()).dtype)
        summary = elip_models.reduction_summary(trained)
        return Setting(Path(text).name, trained, summary, tensors_sha256(trained.state_dict()))
    strategy, _, keep = text.rpartition(" ")
    options = {"strategy": strategy, "keep": float(keep)} if strategy else {"strategy": text}
    reduced = elip_models.reduce_(copy.deepcopy(model), **options)
    return Setting(text, reduced, elip_models.reduction_summary(reduced))


@torch.no_grad()
def features(
    setting: Setting,
    paths: Sequence[Path],
    folder: Path,
    *,
    seed: int,
    advance: Callable[[int], object],
) -> Tensor:
    """Return features (n, D), float32, from `folder` if they were computed before.

    Args:
        seed: of strategies that draw.
        advance: is called with the number of photographs of each batch.
    """

    dtype = next(setting.model.parameters()).dtype

    def compute() -> Tensor:
        torch.manual_seed(seed)
        parts = []
        for images in batches(paths):
            parts.append(setting.model(images.to(dtype)).float())
            advance(len(images))
        return torch.cat(parts)

    key = [str(setting.summary.strategy), setting.text, str(seed), *map(str, paths)]
    key += [setting.weights] if setting.weights else []
    key += [str(dtype)] if dtype != torch.float32 else []
    return stored(folder, key, compute)


def stored(folder: Path, key: Sequence[str], compute: Callable[[], Tensor]) -> Tensor:
    """Return the tensor of the file for `key` in `folder`, made by `compute` if there is none.

    The file appears when it is complete.
    """
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    file = folder / f"{digest}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {"features": compute()})
    return load_file(file)["features"]
