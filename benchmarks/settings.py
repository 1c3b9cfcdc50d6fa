"""Settings: a strategy as `reduce_` takes it, and `keep`.

They are written 'tome 0.5', 'evit:merge=nearest 0.7', or 'tome:r=16' alone. The path of a folder of
`save_reduced` is a reduced model that was trained; its results have the name of the folder.
"""

import copy
from pathlib import Path
from typing import NamedTuple

from torch import nn

import elip_models
from elip_models.saving.files import tensors_sha256
from elip_models.strategies.summary import Summary

DENSE = "dense"


class Setting(NamedTuple):
    """A setting as it was written, and the reduced model.

    weights: the digest of the weights of a trained model; empty for those of the given model.
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
