"""The models by name: `create_model`, `list_models` and `load_model`."""

import os
from dataclasses import fields, replace
from typing import Any, get_type_hints

from elip_models.pretraining.models.albef.model import ALBEF, ALBEFConfig
from elip_models.pretraining.models.albef.tasks import (
    ALBEFNLVR2,
    ALBEFVQA,
    ALBEFEntailment,
    ALBEFRetrieval,
)
from elip_models.pretraining.models.base import PretrainedModel, with_overrides
from elip_models.pretraining.models.blip.model import BLIP, BLIPConfig
from elip_models.pretraining.models.blip.tasks import (
    BLIPNLVR2,
    BLIPVQA,
    BLIPCaptioning,
    BLIPRetrieval,
)
from elip_models.pretraining.models.clip.model import CLIP, CLIPConfig
from elip_models.pretraining.models.clip.tasks import CLIPClassification, CLIPRetrieval
from elip_models.pretraining.models.config import VisionConfig
from elip_models.pretraining.models.meter.config import METERConfig
from elip_models.pretraining.models.meter.model import METER
from elip_models.pretraining.models.meter.tasks import (
    METERNLVR2,
    METERVQA,
    METEREntailment,
    METERRetrieval,
)
from elip_models.saving.files import read_config
from elip_models.saving.hub import fetch_folder
from elip_models.strategies.schedule import PRESETS
from elip_models.validation import did_you_mean, mismatch_error

FINE_TUNED: dict[type[PretrainedModel], tuple[type[PretrainedModel], ...]] = {
    CLIP: (CLIPRetrieval, CLIPClassification),
    ALBEF: (ALBEFRetrieval, ALBEFVQA, ALBEFEntailment, ALBEFNLVR2),
    BLIP: (BLIPRetrieval, BLIPVQA, BLIPNLVR2, BLIPCaptioning),
    METER: (METERRetrieval, METERVQA, METEREntailment, METERNLVR2),
}
FAMILIES = {model.family: model for model in FINE_TUNED}
DOWNSTREAM = {model.family: model for models in FINE_TUNED.values() for model in models}
MODELS = FAMILIES | DOWNSTREAM
"""Family -> class, for pre-training and downstream tasks."""
TINY = {"image_size": 64, "patch_size": 8, "vision_heads": 2, "vision_width": 64, "text_width": 64}
TINY |= {"text_heads": 2, "vocab_size": 1024, "context_length": 32}
TINY_BERT = TINY | {"text_depth": 4, "text_hidden": 256, "max_positions": 64}
TINY_BERT |= {"initializer_range": 0.125, "cls_token_id": 1, "sep_token_id": 2}
TINY_MOMENTUM = {"text_dropout": 0.0, "embed_dim": 64, "queue_size": 64, "momentum": 0.98}
TINY_CROSS = {"cross_width": 64, "cross_depth": 2, "cross_heads": 2, "cross_hidden": 256}
CONFIGS: dict[str, Any] = {
    "clip_vit_b16": CLIPConfig(),
    "clip_vit_s16": CLIPConfig(
        vision_width=384, vision_heads=6, text_width=384, text_heads=6, embed_dim=384
    ),
    "clip_tiny": CLIPConfig(**TINY, text_depth=3, eos_token_id=2, embed_dim=64),
    "albef": ALBEFConfig(),
    "albef_tiny": ALBEFConfig(**TINY_BERT, **TINY_MOMENTUM, text_layers=2, mask_token_id=4),
    "blip": BLIPConfig(),
    "blip_tiny": BLIPConfig(**TINY_BERT, **TINY_MOMENTUM, decoder_token_id=5, encoder_token_id=6),
    "meter": METERConfig(),
    "meter_b32": METERConfig(patch_size=32),
    "meter_tiny": METERConfig(**TINY_BERT, **TINY_CROSS, dropout=0.0, mask_token_id=4),
}
PREFIX = "elip_"
HUB = "hf:"


def list_models() -> list[str]:
    """Return the names for `create_model`: each model, and with the prefix `elip_` reduced."""
    return sorted([*CONFIGS, *(PREFIX + name for name in CONFIGS)])


def create_model(
    name: str,
    pretrained: bool | str | os.PathLike = False,
    *,
    task: str | None = None,
    **overrides: Any,
) -> PretrainedModel:
    """Create a model of the paper by name.

    Example::

        model = create_model("elip_clip_vit_b16", scorer="last")

    Args:
        name: one of `list_models`; the prefix 'elip_' adds the paper's schedule. 'hf:owner/name'
            and 'hf:FOLDER' load a saved model unchanged.
        pretrained: False for random weights; or a folder of `save_pretrained` or a repository of
            the hub, 'owner/name'. Sizes then come from the saved config. So does the schedule for
            an 'elip_' name (the paper's, if there is none); without 'elip_' the model is dense.
        task: downstream task, such as 'vqa' or 'nlvr2', for a model of the same sizes.
        overrides: fields of the model's config, such as `CLIPConfig`.

    Raises:
        TypeError, ValueError: the name or an override is unknown or of another type; the weights
            do not fit an override; or pretrained=True, since no weights are published.
    """
    if isinstance(name, str) and name.startswith(HUB):
        return load_model(name.removeprefix(HUB), **overrides)
    family, config = family_of(name, task), config_of(name)
    if pretrained is True:
        raise ValueError(
            "pretrained: expected False, or a folder written by save_pretrained, got True; no "
            "weights are published under these names"
        )
    if pretrained is False:
        values = vars(config) if task is None else inherited_fields(family, vars(config))
        return family(family.config_class.from_dict(values | overrides))
    trained = family.from_pretrained(pretrained)
    own = trained.config.schedule if name.startswith(PREFIX) else None
    return with_overrides(trained, {"schedule": own or config.schedule} | overrides)


def config_of(name: str) -> Any:
    """Return the config of `create_model(name)`."""
    family, config = family_of(name).family, CONFIGS[name.removeprefix(PREFIX)]
    return replace(config, schedule=PRESETS[family]) if name.startswith(PREFIX) else config


def family_of(name: str, task: str | None = None) -> type[PretrainedModel]:
    """Return the class of `create_model(name, task=task)`."""
    if name not in list_models():
        close = did_you_mean(name, list_models())
        raise ValueError(f"name: expected one of {list_models()}, got {name!r}{close}")
    config = type(CONFIGS[name.removeprefix(PREFIX)])
    family = next(model for model in FAMILIES.values() if model.config_class is config)
    return family if task is None else downstream_of(family, task)


def downstream_of(family: type[PretrainedModel], task: str) -> type[PretrainedModel]:
    """Return the class that fine-tunes a pre-trained family for a downstream task."""
    tasks = {model.task: model for model in FINE_TUNED[family]}
    if task not in tasks:
        raise ValueError(
            f"task: expected a task of {family.__name__}, {', '.join(sorted(tasks))}, got "
            f"{task!r}{did_you_mean(task, tasks)}"
        )
    return tasks[task]


def inherited_fields(model: type[PretrainedModel], values: dict[str, Any]) -> dict[str, Any]:
    """Select the fields of another config that the config of a downstream model takes over.

    These are sizes of the image tower, and fields that differ from the defaults of the pre-trained
    model. Fields that the downstream config lacks, or whose type differs, are left out.
    """
    hints = get_type_hints(model.config_class, include_extras=True)
    defaults = {field.name: field.default for field in fields(model.pretraining.config_class)}
    sizes = {field.name for field in fields(VisionConfig)}
    return {
        name: value
        for name, value in values.items()
        if name in hints and mismatch_error(value, hints[name]) is None
        if name in sizes or value != defaults.get(name)
    }


def load_model(
    folder: str | os.PathLike, *, token: str | bool | None = None, **overrides: Any
) -> PretrainedModel:
    """Load a model of any family that `save_pretrained` wrote.

    Args:
        folder: a folder, or a repository of the hub, 'owner/name' or 'owner/name@revision'.
        token: access token of a private repository.
        overrides: fields of the model's config.

    Raises:
        FileNotFoundError: the folder, the repository, or a file in it is missing.
        ValueError: the config is of another library, or the weights do not fit it.
    """
    folder = fetch_folder(folder, token=token)
    family, _ = read_config(folder)
    if not is_family(family):
        raise ValueError(
            f"folder: expected a model of {sorted(MODELS)}, as save_pretrained writes them, got "
            f"another model in {folder}; open it by open_model('hf:{folder}')"
        )
    return with_overrides(MODELS[family].from_pretrained(folder), overrides)


def is_family(name: Any) -> bool:
    """Return whether a value of config.json, of any type, is a key of `MODELS`."""
    return isinstance(name, str) and name in MODELS


def from_config(family: str, values: dict[str, Any]) -> PretrainedModel:
    """Return a model of a family in `MODELS` with random weights and these fields of its config."""
    kind = MODELS[family]
    return kind(kind.config_class.from_dict(values))
