"""Write docs/transformers_models.md: which transformers vision models can be reduced.

python docs/transformers_models.py           # builds every model on the meta device: a minute

The models are those that transformers lists as models of images, as image-text models that rank,
as video classifiers and as audio classifiers of spectrograms, and the classes of `TOWERS`, with
their default configs.
"""

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from elip_models.analysis.supported_models import check_strategies
from elip_models.strategies import STRATEGIES
from elip_models.vlm.strategy_list import reason_of

PAGE = Path(__file__).with_name("transformers_models.md")
LISTS = ("IMAGE", "ZERO_SHOT_IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION")
TOWERS = (
    *("CLIPVisionModel", "BlipVisionModel", "Blip2VisionModel", "InstructBlipVisionModel"),
    *("AltCLIPVisionModel", "ChineseCLIPVisionModel", "CLIPSegVisionModel", "GitVisionModel"),
    *("MetaClip2VisionModel", "OwlViTVisionModel", "Owlv2VisionModel", "Siglip2VisionModel"),
    *("Idefics2VisionTransformer", "Idefics3VisionTransformer", "SmolVLMVisionTransformer"),
    *("InternVLVisionModel", "JanusVisionModel", "PixioModel", "ASTForAudioClassification"),
    *("CLIPSegForImageSegmentation", "OwlViTForObjectDetection", "Owlv2ForObjectDetection"),
    *(
        "VJEPA2Model",
        "Dinov2Backbone",
        "DINOv3ViTBackbone",
        "DPTForDepthEstimation",
        "VitPoseBackbone",
    ),
)


def names() -> list[str]:
    """Return the names of all model classes on the page."""
    lists = (getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in LISTS)
    listed = {name for each in lists for value in each.values() for name in _names(value)}
    return sorted(listed | set(TOWERS), key=str.lower)


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def build(name: str) -> nn.Module:
    """Return a model of the class on the meta device, with its default config."""
    kind = getattr(transformers, name, None)
    if kind is None:  # a tower that only its module has
        config = getattr(transformers, name.replace("Transformer", "Config"))
        module = config.__module__.replace("configuration", "modeling")
        kind = getattr(importlib.import_module(module), name)
    with torch.device("meta"):
        return kind(kind.config_class())


def answer(name: str) -> str:
    """Return the cells of a class: the strategies that reduce it, or why none does."""
    try:
        model = build(name)
    except (ImportError, ValueError) as error:  # another package, or no default config
        return f"not built | {_one_line(error)}"
    try:
        reasons: dict[str, Any] = check_strategies(model)
    except TypeError as error:
        return f"no | {reason_of(error).removeprefix(f'{name} ').removeprefix('it ')}"
    missing = [f"`{each}`" for each, reason in reasons.items() if reason is not None]
    if not missing:
        return "yes | all"
    few = len(missing) < len(STRATEGIES) / 2
    works = [f"`{each}`" for each, reason in reasons.items() if reason is None]
    return f"yes | {'all but ' + ', '.join(missing) if few else ', '.join(works)}"


def _one_line(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first:.100}".replace("|", "/").strip()


def page(answers: dict[str, str]) -> str:
    """Return the text of the page."""
    taken = sum(cells.startswith("yes") for cells in answers.values())
    lines = [
        "# transformers models",
        "",
        "The transformers models that can be reduced, as `docs/transformers_models.py` tested "
        f"them with transformers {transformers.__version__}: the "
        "classes that the library lists as models of images, as image-text models that rank and as "
        "video classifiers, and image towers of other models, each with its default config. "
        f"{taken} of {len(answers)} can be reduced. The same towers work inside other models, such "
        "as `LlavaForConditionalGeneration`.",
        "",
        "| class | reduced | strategies, or the reason |",
        "| --- | :-: | --- |",
        *(f"| `{name}` | {cells} |" for name, cells in answers.items()),
    ]
    return "\n".join(lines) + "\n"


def read(text: str) -> dict[str, str]:
    """Return the answers on a page by name."""
    rows = (
        line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| `")
    )
    return {name.strip("`"): cells for name, cells in rows}


def main() -> None:
    """Write the page."""
    warnings.simplefilter("ignore")
    answers = {}
    for name in names():
        answers[name] = answer(name)
        sys.stderr.write(f"{name}: {answers[name]}\n")
    PAGE.write_text(page(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
