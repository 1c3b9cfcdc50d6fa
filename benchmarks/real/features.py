"""Class-token features of photographs under a setting, stored so that a run can be continued."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.real.dinov2 import batches
from benchmarks.settings import Setting
from elip_models.saving.files import write_tensors


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
