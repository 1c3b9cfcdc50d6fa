"""The multimodal language models of transformers that are supported, as a table.

All of them replace the placeholder tokens of images in the sequence of embeddings by features, and
then call one language model. A row names the language model; tests run every row.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn

LANGUAGE_MODEL = {
    "aya_vision": "language_model",
    "cohere2_vision": "language_model",
    "fast_vlm": "language_model",
    "gemma3": "language_model",
    "got_ocr2": "language_model",
    "idefics2": "text_model",
    "idefics3": "text_model",
    "internvl": "language_model",
    "llava": "language_model",
    "llava_next": "language_model",
    "llava_next_video": "language_model",
    "llava_onevision": "language_model",
    "mistral3": "language_model",
    "paligemma": "language_model",
    "perception_lm": "language_model",
    "qwen2_5_vl": "language_model",
    "qwen2_vl": "language_model",
    "qwen3_vl": "language_model",
    "smolvlm": "text_model",
    "video_llava": "language_model",
    "vipllava": "language_model",
}
"""The name of the language model inside the model, by `config.model_type`."""
CROSS_ATTENTION = {"mllama": "language_model"}
"""The same for models whose language model reads images by cross-attention."""
TOKEN_IDS = ("image_token_id", "video_token_id")
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Multimodal:
    """The parts of a multimodal language model.

    model: the module that puts image features into the sequence and calls the language model.
    language_model: the language model inside.
    head: the module that calls `model` and computes the loss, if there is one.
    """

    model: nn.Module
    language_model: nn.Module
    head: nn.Module | None

    @property
    def hooked(self) -> tuple[nn.Module, ...]:
        """Return the modules whose hooks remove tokens."""
        modules = (self.model, self.language_model, self.head)
        return tuple(module for module in modules if module is not None)

    @property
    def config(self) -> Any:
        """Return the config of the whole model."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """Return the config of the language model."""
        return self.config.get_text_config()

    @property
    def tower(self) -> nn.Module:
        """Return the image model."""
        names = ("vision_tower", "vision_model", "visual", "image_tower")
        return next(getattr(self.model, name) for name in names if hasattr(self.model, name))

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Return the ids of the tokens that images and videos replace."""
        ids = (getattr(self.config, name, None) for name in TOKEN_IDS)
        return tuple(token_id for token_id in ids if token_id is not None)

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Return the layers of the language model that read images by cross-attention, if any."""
        if self.config.model_type not in CROSS_ATTENTION:
            return ()
        return tuple(self.text_config.cross_attention_layers)

    @property
    def window(self) -> int | None:
        """Return how many tokens back the shortest layer of the language model can attend."""
        types = getattr(self.text_config, "layer_types", None) or ["sliding_attention"]
        is_local = "sliding_attention" in types
        return getattr(self.text_config, "sliding_window", None) if is_local else None

    @property
    def why_tokens_must_stay(self) -> str | None:
        """Return why no token can be removed before the language model's layers, or None."""
        unknown = set(getattr(self.text_config, "layer_types", None) or ()) - LAYER_TYPES
        if unknown:
            kinds = ", ".join(sorted(unknown))
            return f"its language model has layers of type {kinds}, whose state counts every token"
        if "position_ids" not in signature(self.language_model.forward).parameters:
            name = type(self.language_model).__name__
            return (
                "it needs a language model that takes position_ids, which remaining tokens keep, "
                f"in place of {name}"
            )
        return None


def find_multimodal(model: Any) -> Multimodal | None:
    """Return the parts of the multimodal language model that `model` is or contains, or None."""
    if not isinstance(model, nn.Module):
        return None
    parents = {child: module for module in model.modules() for child in module.children()}
    for module in model.modules():
        name = (LANGUAGE_MODEL | CROSS_ATTENTION).get(
            getattr(getattr(module, "config", None), "model_type", None)
        )
        if name is not None and name in module._modules:
            return Multimodal(module, module._modules[name], parents.get(module))
    return None


def refuse_multimodal(model: nn.Module) -> None:
    """Raise TypeError if the model is a multimodal language model, where an image model is meant.

    The message has the name of its image tower.
    """
    if (multimodal := find_multimodal(model)) is not None:
        tower = next(name for name, module in model.named_modules() if module is multimodal.tower)
        raise TypeError(
            "model: expected an image model or an image-text model, got a multimodal language "
            f"model, {type(model).__name__}; use its image tower, model.{tower}"
        )
