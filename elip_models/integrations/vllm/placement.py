"""Where settings stand in `--hf-overrides`. vLLM accepts every key there, also a misspelt one."""

import json
from collections.abc import Mapping
from typing import Any

from elip_models.validation import ConfigError, did_you_mean

KEY = "elip"
"""The key of the settings, in `--hf-overrides` and in the config of a model."""
EXAMPLE = {"keep": 0.25}


def check_placement(overrides: Mapping[str, Any], *, inside: str | None = None) -> None:
    """Raise ConfigError if settings have another key than "elip", or stand in another place.

    Args:
        overrides: of the config of a model, or those of a config inside it.
        inside: the key of the config inside it.
    """
    place = "at the top of --hf-overrides" if inside is None else f"inside {inside!r}"
    for key, value in overrides.items():
        if key == KEY and inside is None:
            continue
        if key == "keep" or (key == "strategy" and inside is None):
            form = _form({key: value})
            raise ConfigError(f"{key}: expected it inside {KEY!r}, got it {place}{form}")
        if key == KEY:
            raise ConfigError(
                f"{key}: expected it at the top of --hf-overrides, got it {place}{_form(value)}"
            )
        if close := did_you_mean(key, [KEY], cutoff=0.8):
            raise ConfigError(f"{key}: expected no key like {KEY!r} {place}, got {key!r}{close}")
        if isinstance(value, Mapping):
            check_placement(value, inside=key)


def _form(settings: Any) -> str:
    """Return the end of an error: the option that was probably meant."""
    if not isinstance(settings, Mapping) or None in settings.values():
        settings = EXAMPLE
    return f"; pass --hf-overrides '{json.dumps({KEY: settings}, default=str)}'"
