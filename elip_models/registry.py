"""create_model and the names of the models."""

import difflib
import os
from dataclasses import replace
from typing import Any

from elip_models.clip import CLIP, CLIPConfig
from elip_models.reduction.schedule import PRESETS

CONFIGS: dict[str, CLIPConfig] = {
    "clip_vit_b16": CLIPConfig(),
    "clip_vit_s16": CLIPConfig(
        vision_width=384, vision_heads=6, text_width=384, text_heads=6, embed_dim=384
    ),
    "clip_tiny": CLIPConfig(
        image_size=64,
        patch_size=8,
        vision_width=64,
        vision_heads=2,
        text_width=64,
        text_depth=3,
        text_heads=2,
        vocab_size=1024,
        context_length=32,
        eos_token_id=2,
        embed_dim=64,
    ),
}
PREFIX = "elip_"


def list_models() -> list[str]:
    """Names for `create_model`: each model dense, and reduced under `elip_`."""
    return sorted([*CONFIGS, *(PREFIX + name for name in CONFIGS)])


def create_model(name: str, pretrained: bool | str | os.PathLike = False, **overrides: Any) -> CLIP:
    """A model of the paper by name.

    Args:
        name: as `list_models` gives them; 'elip_' adds the paper's schedule.
        pretrained: False for random weights, or the folder that
            `save_pretrained` filled; then its own sizes hold, whatever the name says, and its own
            schedule, unless it has none (the paper's) or the name is without 'elip_' (dense).
        overrides: fields of `CLIPConfig`.

    Raises:
        ValueError: an unknown name or override, with the nearest known one; or pretrained=True,
            since no weights are published.
    """
    if name not in list_models():
        close = difflib.get_close_matches(str(name), list_models(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name: expected one of {list_models()}, got {name!r}{hint}")
    if not isinstance(pretrained, (bool, str, os.PathLike)):
        raise TypeError(
            "pretrained: expected False, or a folder written by save_pretrained, "
            f"got {pretrained!r}"
        )
    if pretrained is True:
        raise ValueError(
            "pretrained: expected False, or a folder written by save_pretrained, "
            "got True; no weights are published under these names"
        )
    config = CONFIGS[name.removeprefix(PREFIX)]
    if name.startswith(PREFIX):
        config = replace(config, schedule=PRESETS["clip"])
    trained = CLIP.from_pretrained(pretrained) if pretrained else None
    if trained is not None:
        own = trained.config.schedule if name.startswith(PREFIX) else None
        config = replace(trained.config, schedule=own or config.schedule)
    config = CLIPConfig.from_dict(vars(config) | overrides)
    model = CLIP(config)
    if trained is not None:
        model.load_state_dict(trained.state_dict())
    return model
