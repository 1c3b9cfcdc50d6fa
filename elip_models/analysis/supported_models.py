"""Which models can be reduced, by which strategies, and why others cannot."""

import re
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from elip_models.engine.install import strategy_by_default
from elip_models.strategies import STRATEGIES
from elip_models.towers import as_tower
from elip_models.vlm.strategy_list import list_strategies, reason_of

POOLING = {"token": "class token", "avg": "average", "map": "attention", "": "none"}
FLAGS: dict[str, dict[str, Any]] = {
    f"{name}={value!r}": {name: value}
    for name, value in (("dynamic_img_size", False), ("global_pool", "token"))
}
"""Options of `timm.create_model` that an error may name as a remedy."""


class TimmSupport(NamedTuple):
    """Which strategies can reduce a timm model.

    refusal: why no strategy can, or None. default: name of the strategy of `reduce_(model)`.
    reasons: for each strategy, why it does not work, or None. pooling: how the model pools.
    flag: the option that `timm.create_model` needs, or "". parameters: their number.
    """

    refusal: str | None
    parameters: int
    default: str = ""
    reasons: dict[str, str | None] = {}  # noqa: RUF012, never changed
    pooling: str = ""
    flag: str = ""


def timm_support(name: str) -> TimmSupport:
    """Return which strategies can reduce `timm.create_model(name)`, built on the meta device.

    If the error names an option of `create_model`, the model is built again with it.
    """
    support = _support(name)
    flag = next((flag for flag in FLAGS if flag in (support.refusal or "")), None)
    if flag is None:
        return support
    changed = _support(name, **FLAGS[flag])
    return changed._replace(flag=flag) if changed.refusal is None else changed


def _support(name: str, **options: Any) -> TimmSupport:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, **options)
    parameters = sum(weight.numel() for weight in model.parameters())
    try:
        reasons = check_strategies(model)
    except TypeError as error:
        reason = re.sub(f"^{type(model).__name__} ", "it ", reason_of(error))
        return TimmSupport(reason, parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the default differs, which is the answer
        default = strategy_by_default(as_tower(model), has_text=False, use_config=False)
    pooling = POOLING.get(model.global_pool, model.global_pool)
    return TimmSupport(None, parameters, default.name, reasons, pooling)


def check_strategies(model: nn.Module) -> dict[str, str | None]:
    """Return, for each strategy of image towers, why it does not work, or None if it does.

    Raises:
        TypeError: no strategy works; the message contains the reason.
    """
    entries = list_strategies(model)
    return {entry.name: entry.why_unsupported for entry in entries if entry.name in STRATEGIES}
