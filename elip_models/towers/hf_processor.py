"""How a transformers model expects its images, from the files of its processor."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

from elip_models.images import Stats
from elip_models.validation import check, mismatch_error

NUMBERS = tuple[float, ...]
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def image_stats_of(model: nn.Module) -> Stats | None:
    """Return the statistics in the model's config or in a local file of its processor, or None.

    A model from the hub has its files in the local cache; the network is not used.
    """
    config = model.config
    settings = [vars(config)]
    for file in filter(None, (_local_file(config, name) for name in PROCESSOR_FILES)):
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            check("content", saved, dict)
            check("image_processor", saved.setdefault("image_processor", {}), dict)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file}: expected settings of a processor: {error}") from error
        settings += [saved, saved["image_processor"]]
    with_stats = (
        values for values in settings if values.get("image_mean") and values.get("image_std")
    )
    stats = next(with_stats, None)
    if stats is None:
        return None
    for name in ("image_mean", "image_std"):
        if not isinstance(stats[name], list | tuple) or mismatch_error(tuple(stats[name]), NUMBERS):
            raise ValueError(f"{name}: expected numbers beside the model, got {stats[name]!r:.100}")
    return tuple(stats["image_mean"]), tuple(stats["image_std"])


def _local_file(config: Any, name: str) -> Path | None:
    """Return a file beside the model, in its folder or in the local cache of the hub, or None."""
    if not config.name_or_path:
        return None
    folder, revision = Path(config.name_or_path), getattr(config, "_commit_hash", None)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        path = try_to_load_from_cache(config.name_or_path, name, revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(path) if isinstance(path, str) else None
