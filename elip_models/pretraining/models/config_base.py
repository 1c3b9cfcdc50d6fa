"""The base class of configs, which a recipe reads without importing PyTorch or timm."""

from dataclasses import fields
from typing import Any, Self

from elip_models.validation import check_fields, did_you_mean


class Config:
    """Base of frozen dataclasses of hyper-parameters, which are checked against annotations."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Create a config from a dict; a name that is not a field raises ValueError."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(values.keys() - set(known))
        if unknown:
            close = did_you_mean(unknown[0], known)
            raise ValueError(f"config: expected names among {known}, got {unknown}{close}")
        return cls(**values)
